"""Close of a run: the plots, the summary, the final table and the end of the W&B stream."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.base.figures import Benchmarks, read_benchmarks
from fedsim.base.version import SIGNATURE, made_by, maker, sign
from fedsim.config import to_flat
from fedsim.record.manifest import read_manifest
from fedsim.record.metrics import MetricLog, Row
from fedsim.record.run_record import SIGNED, RunRecord
from fedsim.record.timers import total_seconds
from fedsim.report.guard_section import read_tables
from fedsim.report.plots import write_plots
from fedsim.report.summary import RunFacts, eval_points, facts_from, summary_markdown, terminal_table


def finish_run(record: RunRecord, num_ranks: int) -> None:
    """Write plots and summary of a finished run, print its table and end its stream (rank 0 only).

    Args:
        num_ranks: processes of the run.
    """
    folder = record.folder
    rows = MetricLog(record.metrics_file).rows()
    benchmarks = read_benchmarks(folder) or Benchmarks()
    plots = write_plots(rows, folder, record.config.name, benchmarks)
    places = {
        "summary": str(folder / "summary.md"),
        "metrics": str(record.metrics_file),
        "adapter": str(folder / "adapter"),
        "manifest": str(folder / "manifest.json"),
        "config": str(folder / "config.yaml"),
        "plots": ", ".join(str(p) for p in plots),
        "answers": str(folder / "answers"),
        **({"items": str(folder / "items")} if (folder / "items").is_dir() else {}),
        **({"guard": str(folder / "guard")} if (folder / "guard").is_dir() else {}),
        "artefacts": record.config.record.artefacts,
        "checkpoints": str(record.checkpoints.folder),
        "logs": str(folder / "logs"),
    }
    settings = to_flat(record.config)
    if (streamed := record.stream.place) is not None:
        places["W&B"] = streamed
    facts = facts_from(
        settings,
        num_ranks=num_ranks,
        total_s=total_seconds(rows),  # over all sessions
        places=places,
        plots=[p.name for p in plots],
        notes=record.notes,
        guard_tables=read_tables(folder / "guard"),
        maker=maker(made_by()),
        manifest=read_manifest(folder / "manifest.json"),
        benchmarks=benchmarks,
    )
    for name in SIGNED:
        if (folder / name).is_dir() and not (folder / name / SIGNATURE).exists():
            sign(folder / name)
    (folder / "summary.md").write_text(summary_markdown(rows, facts), encoding="utf-8")
    print(f"\n{terminal_table(rows, facts)}", flush=True)
    record.stream.close(headline(rows, facts))  # last: a server that does not answer takes nothing from the run


def headline(rows: Sequence[Row], facts: RunFacts) -> dict[str, float | int | str]:
    """The run in one row, as W&B's table of runs shows it: arm, time, and the benchmarks at every point of the run.

    ``final/…`` is the global model after the last round, whatever has been done to it.
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
            for name in (figure.metric, f"{figure.metric}_low", f"{figure.metric}_high", figure.count_metric):
                if name in row:
                    found[f"{place}/{name.removeprefix('eval/')}"] = row[name]
    return found
