"""Close of a run: the plots, the summary, the final table and the end of the W&B stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.base.figures import Benchmarks, read_benchmarks
from fedsim.base.version import SIGNATURE, made_by, maker, sign
from fedsim.config import to_flat
from fedsim.record.manifest import read_manifest
from fedsim.record.metrics import MetricLog, Row
from fedsim.record.run_record import SIGNED, RunRecord
from fedsim.record.timers import total_seconds
from fedsim.report.guard_section import read_tables
from fedsim.report.plots import write_plots
from fedsim.report.summary import (
    RunFacts,
    eval_points,
    facts_from,
    summary_markdown,
    terminal_table,
)


def finish_run(record: RunRecord, num_ranks: int) -> None:
    """Write plots and summary of a finished run, print its table and end its stream (rank 0 only).

    Args:
        num_ranks: processes of the run.
    """
    folder = record.folder
    rows = MetricLog(record.metrics_file).rows()
    benchmarks = read_benchmarks(folder) or Benchmarks()
    plots = write_plots(rows, folder, record.config.name, benchmarks)
    facts = facts_from(
        to_flat(record.config),
        num_ranks=num_ranks,
        total_s=total_seconds(rows),  # over all sessions of a resumed run
        places=_places(record, plots),
        plots=[path.name for path in plots],
        notes=record.notes,
        guard_tables=read_tables(folder / "guard"),
        maker=maker(made_by()),
        manifest=read_manifest(folder / "manifest.json"),
        benchmarks=benchmarks,
    )
    for name in SIGNED:
        if (folder / name).is_dir() and not (folder / name / SIGNATURE).exists():
            sign(folder / name)
    # summary.md comes last of the files: it marks the run as finished.
    (folder / "summary.md").write_text(summary_markdown(rows, facts), encoding="utf-8")
    print(f"\n{terminal_table(rows, facts)}", flush=True)
    # After that, so that a server that does not answer costs the run nothing.
    record.stream.close(headline(rows, facts))


def _places(record: RunRecord, plots: Sequence[Path]) -> dict[str, str]:
    """Return the places of what the run has written, by title, in the order of the summary."""
    folder = record.folder
    places = {
        "summary": str(folder / "summary.md"),
        "metrics": str(record.metrics_file),
        "adapter": str(folder / "adapter"),
        "manifest": str(folder / "manifest.json"),
        "config": str(folder / "config.yaml"),
        "plots": ", ".join(str(path) for path in plots),
        "answers": str(folder / "answers"),
    }
    for name in ("items", "guard"):
        if (folder / name).is_dir():
            places[name] = str(folder / name)
    places["artefacts"] = record.config.record.artefacts
    places["checkpoints"] = str(record.checkpoints.folder)
    places["logs"] = str(folder / "logs")
    if record.stream.place is not None:
        places["W&B"] = record.stream.place
    return places


def headline(rows: Sequence[Row], facts: RunFacts) -> dict[str, float | int | str]:
    """Summarise the run in one row: arm, time, and the benchmarks at every point of the run.

    W&B's table of runs shows it. ``final/…`` is the model that the run ends with: after CAI
    in the last round, or the global model of a run without it.
    """
    found: dict[str, float | int | str] = {
        "arm": facts.arm,
        "total_s": facts.total_s,
        "num_rounds": facts.num_rounds,
        "num_ranks": facts.num_ranks,
    }
    for point, row in eval_points(rows).items():
        place = "final" if point in ("after_cai", "global") else point
        for figure in facts.benchmarks.headlines:
            ends = (f"{figure.metric}_low", f"{figure.metric}_high")
            for name in (figure.metric, *ends, figure.count_metric):
                if name in row:
                    found[f"{place}/{name.removeprefix('eval/')}"] = row[name]
    return found
