"""The paper's Table 1 in one command: ``tools/table1.py [CONFIG.yaml] [key=value …] [--seeds 0-2] [--paper]``.

Runs what is not finished yet (four methods under FedAvg and SCAFFOLD, every seed), then writes the table beside the
published one, with 95 % intervals that resample seeds and prompts, and what each difference of the paper's comes to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.config import load_config
from fedsim.launching import Parser, launched
from fedsim.record.blocks import write_block
from fedsim.study import table1
from fedsim.study.cells import Launch, run_cells
from fedsim.study.command import add_run_options, launch_of, parse_seeds, say, write_csv
from fedsim.study.outcomes import Outcome
from fedsim.study.stamp import measured_on

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="tools/table1.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, default_seeds="0-2")
    table1.add_schedule_option(parser)
    parser.add_argument("--readme", action="store_true", help="also write the table into the README")
    return parser.parse_intermixed_args(argv)


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


def page(table: table1.TableOne, seeds: Sequence[int]) -> str:
    """The study as Markdown."""
    manifests = [outcome.manifest for outcomes in table.runs.values() for outcome in outcomes]
    parts = [
        table1.arm_table(table).markdown(),
        f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}. [low, high] = 95 % interval over seeds and prompts. "
        + measured_on(manifests),
        table1.claim_table(table).markdown(),
        "Differences are paired by seed and prompt. Would show from: the smallest true difference that this many seeds "
        "and prompts show with 80 % power at the 5 % level. The paper gives single runs without intervals.",
    ]
    controls = table1.control_table(table)
    return "\n\n".join(parts if controls is None else [*parts, controls.markdown()])


def run(args: argparse.Namespace) -> None:
    """Run what is missing, and write the table."""
    seeds = parse_seeds(args.seeds)
    launch = launch_of(args, table1.STUDY, table1.CONFIG, table1.PAPER_SCHEDULE if args.paper else {})
    table = table1.TableOne(run_arms(launch, seeds))
    text = page(table, seeds)
    (launch.folder / "table1.md").write_text(f"# Table 1\n\n{text}\n", encoding="utf-8")
    write_csv(launch.folder / "table1.csv", table1.tidy_rows(table))
    shown = "\n\n".join(part.plain() for part in (table1.arm_table(table), table1.claim_table(table)))
    print(f"\n{shown}\n\nWritten: {launch.folder}/table1.md, table1.csv", flush=True)
    if args.readme:
        write_block(ROOT / "README.md", "table1", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    return launched(lambda: parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
