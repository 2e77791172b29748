"""A grid over configuration keys: ``fedsim sweep SWEEP.yaml [--form quick|full] [key=value …] [--seeds 0-2]``.

Runs what is not finished yet, then writes a tidy CSV, a plot and findings that follow from
intervals over seeds. ``--publish`` also copies the CSV to ``docs/results`` and writes plot and page
there; ``--page`` runs nothing and writes them from the committed CSV. Sweeps that ship with fedsim
are in ``configs/sweeps``; ``fedsim/study/grid.py`` describes their files.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.config import config_file
from fedsim.report.finished import FinishedRun
from fedsim.report.provenance import measured_on
from fedsim.study.command import (
    PAGE,
    PUBLISH,
    add_run_options,
    check_publishing,
    launch_of,
    made_by,
    parse_seeds,
    results_folder,
    say,
    write_csv,
)
from fedsim.study.grid import FORMS, Sweep, point_name, read_sweep
from fedsim.study.outcomes import check_paired
from fedsim.study.published import ORIGINS, origin_of, read_origin, write_origin
from fedsim.study.runs import run_cells
from fedsim.study.sweep import finding, read_records, tidy_rows
from fedsim.study.sweep_plot import write_plot

INTERVALS = "Intervals are over seeds, paired; the prompts are one fixed set."

INTRODUCTION = (
    "Findings are computed by `fedsim sweep FILE --page` from {csv}, by 95 % intervals over paired "
    "seeds; means stand in brackets. The cells are those of the quick form of `configs/sweeps/{file}.yaml`. "
    "[What such figures can and cannot show](../embedded-world.md)."
)


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, Sweep]:
    """Read the command line, and the sweep's file that it names."""
    parser = Parser(
        prog="fedsim sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser, default_seeds="", first="SWEEP.yaml")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="quick",
        help="how much of the grid (default quick)",
    )
    args = parser.parse_intermixed_args(argv)
    files = [word for word in args.words if "=" not in word]
    if len(files) != 1:
        raise ConfigError(
            f"command line: one sweep file, such as configs/sweeps/cai.yaml, not {len(files)}",
        )
    args.words.remove(files[0])
    args.made_by = made_by("fedsim sweep", argv)
    check_publishing(args)
    return args, read_sweep(config_file(Path(files[0])), args.form)


def run(args: argparse.Namespace, sweep: Sweep) -> None:
    """Run the cells and write what they show."""
    if not args.page:
        _measure(args, sweep)
    if args.publish or args.page:
        results = results_folder(PAGE)
        write_plot(
            sweep,
            read_records(_published(results, sweep, "csv")),
            _published(results, sweep, "png"),
        )
        _published(results, sweep, "md").write_text(page(results, sweep), encoding="utf-8")


def _published(results: Path, sweep: Sweep, suffix: str) -> Path:
    """A sweep's committed file: ``csv``, ``png`` or ``md``."""
    return results / f"sweep-{sweep.name}.{suffix}"


def _measure(args: argparse.Namespace, sweep: Sweep) -> None:
    """Run what is missing; write records, plot and findings, and copy the records where asked."""
    # The cells: every point with every seed.
    seeds = parse_seeds(args.seeds or sweep.seeds)
    varied = set[str]().union(*sweep.points)
    launch = launch_of(
        args,
        f"sweep-{sweep.name}-{args.form}",
        sweep.config,
        sweep.settings,
        varied,
    )
    cells = sweep.cells(seeds)
    size = f"{len(sweep.points)} points, {len(seeds)} seed(s): {len(cells)} runs"
    say(f"{sweep.what}: {size}, {launch.num_jobs} at once")
    folders = run_cells(cells, launch, say)

    # Finished runs by point, in the order of the seeds.
    runs: dict[str, list[FinishedRun]] = {}
    for point in sweep.points:
        name = point_name(point)
        runs[name] = [FinishedRun.read(folders[f"{name}-s{seed}"]) for seed in seeds]
    check_paired(list(runs.values()))

    # Records, plot and findings; findings are computed from the file of records.
    folder = launch.folder
    write_csv(folder / "sweep.csv", tidy_rows(sweep, runs))
    records = read_records(folder / "sweep.csv")
    outcomes = list(itertools.chain.from_iterable(runs.values()))
    stamp = measured_on([outcome.manifest for outcome in outcomes])
    origin = origin_of(outcomes[0].config, tuple(seeds), stamp, args.made_by)
    lines = [finding(comparison, records) for comparison in sweep.findings]
    write_plot(sweep, records, folder / "sweep.png")
    note = f"{origin.setting} {INTERVALS} {stamp}"
    (folder / "finding.md").write_text("\n".join([*lines, "", note, ""]), encoding="utf-8")
    written = f"Written: {folder}/sweep.csv, sweep.png, finding.md"
    print("\n".join(["", *lines, "", note, written]), flush=True)

    # The committed copy.
    if args.publish:
        results = results_folder(PUBLISH)
        shutil.copyfile(folder / "sweep.csv", _published(results, sweep, "csv"))
        write_origin(results / ORIGINS, f"sweep-{sweep.name}", origin)


def page(results: Path, sweep: Sweep) -> str:
    """The result page, made from the committed records only."""
    name = f"sweep-{sweep.name}"
    records = read_records(_published(results, sweep, "csv"))
    origin = read_origin(results / ORIGINS, name)
    parts = [f"# Sweep: {sweep.what}"]
    if sweep.about:
        parts.append(sweep.about)
    parts += [
        INTRODUCTION.format(file=sweep.name, csv=f"[{name}.csv]({name}.csv)"),
        "\n".join(f"- {finding(comparison, records)}" for comparison in sweep.findings),
        f"![{sweep.what}]({name}.png)",
        f"{origin.setting} {INTERVALS} {origin.measured}",
        f"Made by {origin.made_by}.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse_args(argv), lambda asked: run(*asked))
