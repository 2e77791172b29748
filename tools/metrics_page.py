"""Write docs/metrics.md, the reference of all metrics: ``python tools/metrics_page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.launching import Parser, launched
from fedsim.run.metrics_page import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def write(_: argparse.Namespace) -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/metrics_page.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
