"""The paper's Table 2 in one command: ``tools/table2.py [CONFIG.yaml] [key=value …] [--seeds 0-2]``.

The guard before and after fine-tuning on the clients' rows, and the red share before and after filtering, beside the
published figures. The runs are Table 1's own (FedAvg, FL + filter): after that table, this one takes no further run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.config import load_config
from fedsim.launching import launched
from fedsim.study import table1, table2
from fedsim.study.cells import run_cells
from fedsim.study.claims import FILTER
from fedsim.study.command import launch_of, parse_seeds, parse_table, publish, say
from fedsim.study.outcomes import Outcome
from fedsim.study.stamp import measured_on

ROOT = Path(__file__).resolve().parents[1]


def run(args: argparse.Namespace) -> None:
    """Run what is missing, and write the table."""
    seeds = parse_seeds(args.seeds)
    launch = launch_of(args, table1.STUDY, table1.CONFIG, table1.PAPER_SCHEDULE if args.paper else {}, table1.VARIED)
    planned = table1.cells(load_config(launch.config, launch.overrides), seeds)
    wanted = [cell for cell in planned if cell.labels == {"aggregation": "FedAvg", "method": FILTER}]
    folders = run_cells(wanted, launch, say)
    outcomes = [Outcome(folders[cell.name]) for cell in wanted]
    table = table2.guard_table(outcomes)
    stamp = measured_on([outcome.manifest for outcome in outcomes])
    note = (
        f"Positive = red. {len(seeds)} seed(s): {', '.join(map(str, seeds))}. [low, high] = 95 % interval over seeds "
        f"and rows. Undefined: in some seed the guard called no row unsafe. {stamp}"
    )
    note = " ".join(filter(None, [note, table2.untuned_note(outcomes)]))
    text = f"{table.markdown()}\n\n{note}"
    (launch.folder / "table2.md").write_text(f"# Table 2\n\n{text}\n", encoding="utf-8")
    print(f"\n{table.plain()}\n\n{note}\n\nWritten: {launch.folder}/table2.md", flush=True)
    if args.publish:
        publish(ROOT / "README.md", "table2", f"{text} Made by {args.made_by}.", {})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    return launched(lambda: parse_table("tools/table2.py", __doc__, argv), run)


if __name__ == "__main__":
    sys.exit(main())
