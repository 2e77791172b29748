"""The paper's Table 1 in one command: ``fedsim table1 [CONFIG.yaml] [key=value …] [--seeds 0-2] [--paper]``.

Runs what is not finished yet (four methods under FedAvg and SCAFFOLD, every seed), then writes one
row per arm, seed and figure, the table beside the published one, and the paper's differences as
measured, with 95 % intervals. ``--publish`` also copies the rows to ``docs/results`` and writes
``table1.md`` there; ``--page`` runs nothing and writes that page from the committed rows.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.launching import launched
from fedsim.config import load_config
from fedsim.report.finished import FinishedRun
from fedsim.report.provenance import measured_on
from fedsim.study import command, table1, table1_words
from fedsim.study.command import launch_of, parse_seeds, parse_table, results_folder, say
from fedsim.study.published import (
    ORIGINS,
    Origin,
    origin_of,
    read_origin,
    write_origin,
)
from fedsim.study.runs import Launch, run_cells
from fedsim.study.seed_rows import SeedRow, read_seed_rows, write_seed_rows

PAGE = "table1.md"

ROWS, CONTROL_ROWS = "table1.csv", "table1-replay.csv"
"""Files of rows; the second is the replay control's, of which there is no configuration yet."""

INTRODUCTION = (
    "The paper's eight arms on the tiny model and the fictional corpus that ship with fedsim. "
    "[What such figures can and cannot show](../embedded-world.md). Everything here is computed "
    f"by `fedsim table1 --page` from [{ROWS}]({ROWS}), which has one row per arm, seed and figure "
    "with the outcome of every item. The bits are those of one machine, torch version and number "
    "of threads: on another CPU a figure may differ by a prompt."
)

CONTROL_NOTE = (
    f"The replay control ([{CONTROL_ROWS}]({CONTROL_ROWS})) is FedAvg, FL + CAI with two changes: "
    "the target of CAI's SFT is the first response instead of the revision (`pair.rejected` for "
    "`pair.chosen` in `Aligner.align`; [replay-control.patch](replay-control.patch), made for "
    "commit 883972f9a1), and `cai.dpo_lr=1e-12`."
)


def run_arms(launch: Launch, seeds: Sequence[int]) -> dict[table1.Arm, list[FinishedRun]]:
    """Run the cells; returns the finished runs of every arm."""
    planned = table1.cells(load_config(launch.config, launch.overrides), seeds)
    folders = run_cells(planned, launch, say)
    found: dict[table1.Arm, list[FinishedRun]] = {}
    for cell in planned:
        outcome = FinishedRun.read(folders[cell.name])
        used = outcome.config.federation.algorithm
        algorithm = next(name for name in table1.AGGREGATIONS if name == used)
        arm = table1.Arm(algorithm, cell.labels["method"])
        found.setdefault(arm, []).append(outcome)
    return found


def run(args: argparse.Namespace) -> None:
    """Run what is missing, and write the table."""
    if not args.page:
        _measure(args)
    if args.publish or args.page:
        results = results_folder(command.PAGE)
        (results / PAGE).write_text(page(results), encoding="utf-8")


def _measure(args: argparse.Namespace) -> None:
    """Run what is missing; write rows and table, and copy the rows where asked."""
    # Runs of all arms.
    seeds = parse_seeds(args.seeds)
    schedule = table1.PAPER_SCHEDULE if args.paper else {}
    launch = launch_of(args, table1.STUDY, table1.CONFIG, schedule, table1.VARIED)
    runs = run_arms(launch, seeds)
    outcomes = list(itertools.chain.from_iterable(runs.values()))

    # Rows and table; the table is computed from the file of rows.
    stamp = measured_on([outcome.manifest for outcome in outcomes])
    origin = origin_of(outcomes[0].config, tuple(seeds), stamp, args.made_by)
    folder = launch.folder
    write_seed_rows(folder / ROWS, table1.seed_rows(runs))
    write_origin(folder / ORIGINS, table1.STUDY, origin)
    table = table1.TableOne(read_seed_rows(folder / ROWS))
    paragraphs = ["# Table 1", *table1_words.page(table, origin)]
    (folder / "table1.md").write_text("\n\n".join(paragraphs) + "\n", "utf-8")
    written = f"Written: {folder}/table1.md, {ROWS}"
    print("", *table1_words.shown(table, origin), written, sep="\n\n", flush=True)

    # The committed copy.
    if args.publish:
        results = results_folder(command.PUBLISH)
        shutil.copyfile(folder / ROWS, results / ROWS)
        write_origin(results / ORIGINS, table1.STUDY, origin)


def page(results: Path) -> str:
    """The result page, made from the committed rows only."""
    origin = read_origin(results / ORIGINS, table1.STUDY)
    rows, control = read_seed_rows(results / ROWS), _control(results, origin)
    table = table1.TableOne([*rows, *control])
    parts = ["# Table 1 in the embedded world", *table1_words.replay_lines(table), INTRODUCTION]
    if control:
        parts.append(CONTROL_NOTE)
    parts += [*table1_words.page(table, origin), f"Made by {origin.made_by}."]
    return "\n\n".join(parts) + "\n"


def _control(results: Path, origin: Origin) -> list[SeedRow]:
    """The replay control's rows, where they belong to the same seeds; else none."""
    path = results / CONTROL_ROWS
    if not path.is_file():
        return []
    rows = read_seed_rows(path)
    if sorted({row.seed for row in rows}) != sorted(origin.seeds):
        return []
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse_table("fedsim table1", __doc__, argv), run)
