"""A grid over configuration keys: ``tools/sweep.py SWEEP.yaml [--form quick|full] [key=value …] [--seeds 0-2]``.

Runs what is not finished yet, then writes a tidy CSV, a plot and a finding of two lines that follow from intervals
over seeds and prompts. Sweeps that ship with fedsim are in ``configs/sweeps``; ``fedsim/study/grid.py`` describes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import ConfigError
from fedsim.launching import Parser, launched
from fedsim.study.cells import run_cells
from fedsim.study.command import add_run_options, launch_of, made_by, parse_seeds, publish, say, write_csv
from fedsim.study.grid import FORMS, Sweep, point_name, read_sweep
from fedsim.study.outcomes import Outcome, check_paired
from fedsim.study.stamp import measured_on
from fedsim.study.sweep import finding, tidy_rows
from fedsim.study.sweep_plot import write_plot

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Sweep]:
    """The command line and the sweep that it names."""
    parser = Parser(prog="tools/sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, default_seeds="")
    parser.add_argument("--form", choices=FORMS, default="quick", help="how much of the grid (default quick)")
    args = parser.parse_intermixed_args(argv)
    files = [word for word in args.words if "=" not in word]
    if len(files) != 1:
        raise ConfigError(f"command line: one sweep file, such as configs/sweeps/cai.yaml, not {len(files)}")
    args.words.remove(files[0])
    args.made_by = made_by("tools/sweep.py", sys.argv[1:] if argv is None else argv)
    return args, read_sweep(Path(files[0]), args.form)


def run(args: argparse.Namespace, sweep: Sweep) -> None:
    """Run the cells and write what they show."""
    seeds = parse_seeds(args.seeds or sweep.seeds)
    varied = {key for point in sweep.points for key in point}
    launch = launch_of(args, f"sweep-{sweep.name}-{args.form}", sweep.config, sweep.settings, varied)
    cells = sweep.cells(seeds)
    say(f"{sweep.what}: {len(sweep.points)} points, {len(seeds)} seed(s): {len(cells)} runs, {launch.num_jobs} at once")
    folders = run_cells(cells, launch, say)
    runs = {
        point_name(point): [Outcome(folders[f"{point_name(point)}-s{seed}"]) for seed in seeds]
        for point in sweep.points
    }
    check_paired(list(runs.values()))
    lines = [finding(comparison, runs) for comparison in sweep.findings]
    stamp = measured_on([outcome.manifest for outcomes in runs.values() for outcome in outcomes])
    write_csv(launch.folder / "sweep.csv", tidy_rows(sweep, runs))
    write_plot(sweep, runs, launch.folder / "sweep.png")
    (launch.folder / "finding.md").write_text("\n".join([*lines, "", stamp, ""]), encoding="utf-8")
    print("\n".join(["", *lines, "", stamp, f"Written: {launch.folder}/sweep.csv, sweep.png, finding.md"]), flush=True)
    if args.publish:
        docs = ROOT / "docs"
        files = {launch.folder / f"sweep.{kind}": docs / f"sweep-{sweep.name}.{kind}" for kind in ("png", "csv")}
        source = f"Made by {args.made_by}; figures: [sweep-{sweep.name}.csv](sweep-{sweep.name}.csv)."
        text = "\n\n".join(
            ["\n".join(f"- {line}" for line in lines), f"![{sweep.what}](sweep-{sweep.name}.png)", stamp, source]
        )
        publish(docs / "sweeps.md", sweep.name, text, files)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    return launched(lambda: parse_args(argv), lambda asked: run(*asked))


if __name__ == "__main__":
    sys.exit(main())
