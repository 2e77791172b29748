"""The paper's Table 1 in one command: ``tools/table1.py [CONFIG.yaml] [key=value …] [--seeds 0-2] [--paper]``.

Runs what is not finished yet (four methods under FedAvg and SCAFFOLD, every seed), then writes the table beside the
published one, with 95 % intervals that count seeds and prompts as draws, and what the paper's differences come to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.config import load_config
from fedsim.config.measuring import is_unrated
from fedsim.launching import launched
from fedsim.study import table1
from fedsim.study.cells import Launch, run_cells
from fedsim.study.command import launch_of, parse_seeds, parse_table, publish, say, write_csv
from fedsim.study.outcomes import Outcome
from fedsim.study.stamp import measured_on

ROOT = Path(__file__).resolve().parents[1]


def run_arms(launch: Launch, seeds: Sequence[int]) -> dict[table1.Arm, list[Outcome]]:
    """Run the cells; returns the finished runs of every arm."""
    planned = table1.cells(load_config(launch.config, launch.overrides), seeds)
    folders = run_cells(planned, launch, say)
    found: dict[table1.Arm, list[Outcome]] = {}
    for cell in planned:
        outcome = Outcome(folders[cell.name])
        algorithm = next(a for a in table1.AGGREGATIONS if a == outcome.config.federation.algorithm)
        found.setdefault(table1.Arm(algorithm, cell.labels["method"]), []).append(outcome)
    return found


def run(args: argparse.Namespace) -> None:
    """Run what is missing, and write the table."""
    seeds = parse_seeds(args.seeds)
    launch = launch_of(args, table1.STUDY, table1.CONFIG, table1.PAPER_SCHEDULE if args.paper else {}, table1.VARIED)
    table = table1.TableOne(run_arms(launch, seeds))
    stamp = measured_on([outcome.manifest for outcomes in table.runs.values() for outcome in outcomes])
    note = (
        f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}; attacks: eval.advbench={table.attacks}. [low, high] = 95 "
        f"% interval over seeds and prompts. {stamp}"
    )
    first = next(iter(table.runs.values()))[0].config
    if is_unrated(first.eval.mt_bench, judged=first.judge.kind != "none"):
        note += " MT-Bench answers were written and not rated: judge.* sets a judge."
    found = "\n".join(table1.verdicts(table))
    controls = table1.control_table(table)
    parts = [table1.arm_table(table).markdown(), note, found, table1.claim_table(table).markdown(), table1.CLAIM_NOTE]
    parts += [] if controls is None else [controls.markdown()]
    folder = launch.folder
    (folder / "table1.md").write_text("\n\n".join(["# Table 1", *parts]) + "\n", encoding="utf-8")
    write_csv(folder / "table1.csv", table1.tidy_rows(table))
    shown = [table1.arm_table(table).plain(), note, table1.claim_table(table).plain(), found]
    shown += [] if controls is None else [controls.plain()]
    print("", *shown, f"Written: {folder}/table1.md, table1.csv", sep="\n\n", flush=True)
    if args.publish:
        source = f"Made by {args.made_by}."
        publish(ROOT / "README.md", "table1", "\n\n".join([*parts[:3], source]), {})
        figures = {folder / "table1.csv": ROOT / "docs" / "table1.csv"}
        publish(ROOT / "docs" / "table1.md", "table1", "\n\n".join([*parts, source]), figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    return launched(lambda: parse_table("tools/table1.py", __doc__, argv), run)


if __name__ == "__main__":
    sys.exit(main())
