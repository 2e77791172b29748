"""What ends a run: the plots, the summary and the closing table."""

from __future__ import annotations

from fedsim.config import to_flat
from fedsim.record.guard_section import read_tables
from fedsim.record.metrics import MetricLog
from fedsim.record.plots import write_plots
from fedsim.record.run_record import RunRecord
from fedsim.record.summary import facts_from, summary_markdown, terminal_table
from fedsim.record.timers import top_level_seconds


def finish_run(record: RunRecord, num_ranks: int) -> None:
    """Write plots and summary of a finished run, and print its table (rank 0 only).

    Args:
        num_ranks: processes of the run.
    """
    folder = record.folder
    rows = MetricLog(record.metrics_file).rows()
    plots = write_plots(rows, folder, record.config.name)
    places = {
        "summary": str(folder / "summary.md"),
        "metrics": str(record.metrics_file),
        "adapter": str(folder / "adapter"),
        "manifest": str(folder / "manifest.json"),
        "config": str(folder / "config.yaml"),
        "plots": ", ".join(str(p) for p in plots),
        "answers": str(folder / "answers"),
        **({"guard": str(folder / "guard")} if (folder / "guard").is_dir() else {}),
        "artefacts": record.config.record.artefacts,
        "checkpoints": str(record.checkpoints.folder),
    }
    facts = facts_from(
        to_flat(record.config),
        num_ranks=num_ranks,
        total_s=sum(sum(top_level_seconds(row).values()) for row in rows),  # over all sessions of a resumed run
        places=places,
        plots=[p.name for p in plots],
        notes=record.notes,
        guard_tables=read_tables(folder / "guard"),
    )
    (folder / "summary.md").write_text(summary_markdown(rows, facts), encoding="utf-8")
    print(f"\n{terminal_table(rows, facts)}", flush=True)
