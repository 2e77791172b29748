"""Write docs/results/sources.md, the public data sets and models: ``python tools/sources_page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.launching import Parser, launched
from fedsim.record.sources import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "sources.md"


def write(_: argparse.Namespace) -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/sources_page.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
