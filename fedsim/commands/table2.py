"""The paper's Table 2 in one command: ``fedsim table2 [CONFIG.yaml] [key=value …] [--seeds 0-2]``.

The guard before and after fine-tuning on the clients' rows, and the red share before and after
filtering, beside the published figures. The runs are Table 1's own (FedAvg, FL + filter): after
that table, this one takes no further run. ``--publish`` and ``--page`` are as in ``fedsim table1``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.launching import launched
from fedsim.config import load_config
from fedsim.report.finished import FinishedRun
from fedsim.report.provenance import measured_on
from fedsim.study import command, table1, table2
from fedsim.study.command import launch_of, parse_seeds, parse_table, results_folder, say
from fedsim.study.paper_claims import FILTER
from fedsim.study.published import ORIGINS, origin_of, read_origin, write_origin
from fedsim.study.runs import run_cells

PAGE = "table2.md"

ROWS = "table2.csv"
"""File of the counts by seed."""

INTRODUCTION = (
    "The guard before and after fine-tuning, on the rows of all clients, and the red share that "
    "it leaves. [What such figures can and cannot show](../embedded-world.md). Computed by "
    f"`fedsim table2 --page` from the counts by seed in [{ROWS}]({ROWS})."
)


def run(args: argparse.Namespace) -> None:
    """Run what is missing, and write the table."""
    if not args.page:
        _measure(args)
    if args.publish or args.page:
        results = results_folder(command.PAGE)
        (results / PAGE).write_text(page(results), encoding="utf-8")


def _measure(args: argparse.Namespace) -> None:
    """Run what is missing; write counts and table, and copy the counts where asked."""
    # Table 1's runs of FedAvg, FL + filter.
    seeds = parse_seeds(args.seeds)
    schedule = table1.PAPER_SCHEDULE if args.paper else {}
    launch = launch_of(args, table1.STUDY, table1.CONFIG, schedule, table1.VARIED)
    planned = table1.cells(load_config(launch.config, launch.overrides), seeds)
    labels = {"aggregation": "FedAvg", "method": FILTER}
    wanted = [cell for cell in planned if cell.labels == labels]
    folders = run_cells(wanted, launch, say)
    outcomes = [FinishedRun.read(folders[cell.name]) for cell in wanted]

    # Counts and table.
    rows = table2.count_rows(outcomes)
    stamp = measured_on([outcome.manifest for outcome in outcomes])
    origin = origin_of(outcomes[0].config, tuple(seeds), stamp, args.made_by)
    table, note = table2.guard_table(rows), table2.note(origin, rows)
    table2.write_count_rows(launch.folder / ROWS, rows)
    text = f"# Table 2\n\n{table.markdown()}\n\n{note}\n"
    (launch.folder / "table2.md").write_text(text, encoding="utf-8")
    print(f"\n{table.plain()}\n\n{note}\n\nWritten: {launch.folder}/table2.md, {ROWS}", flush=True)

    # The committed copy.
    if args.publish:
        results = results_folder(command.PUBLISH)
        shutil.copyfile(launch.folder / ROWS, results / ROWS)
        write_origin(results / ORIGINS, table2.STUDY, origin)


def page(results: Path) -> str:
    """The result page, made from the committed counts only."""
    origin, rows = (
        read_origin(results / ORIGINS, table2.STUDY),
        table2.read_count_rows(results / ROWS),
    )
    title = "# Table 2 in the embedded world"
    parts = [title, INTRODUCTION, table2.guard_table(rows).markdown(), table2.note(origin, rows)]
    return "\n\n".join([*parts, f"Made by {origin.made_by}."]) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse_table("fedsim table2", __doc__, argv), run)
