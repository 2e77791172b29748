"""Write docs/config.md, the reference of all configuration keys: ``python tools/config_page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.launching import Parser, launched
from fedsim.config.page import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"


def write(_: argparse.Namespace) -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/config_page.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
