"""One self-contained HTML page and its pictures from finished runs: ``fedsim report RUN... [--out DIR]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.report.build import report
from fedsim.report.runs import load_runs


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = Parser(prog="fedsim report", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="directory of a finished run",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        help="where report.html and the PNGs go",
    )
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Write page and pictures, and print the page's path."""
    page, files = report(load_runs(args.runs))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (args.out / name).write_bytes(content)
        (args.out / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out {args.out}: cannot be written ({error.strerror}); give another folder",
        ) from error
    print(args.out / "report.html")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse_args(argv), write)
