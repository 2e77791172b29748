"""Write docs/results/sources.md, the public data sets and models: ``python tools/sources_page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedsim.base.launching import Parser, launched
from fedsim.base.tables import Table
from fedsim.evaluate.sources import SOURCES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "sources.md"

INTRODUCTION: Final = (
    "Files and models that fedsim takes by key. Nothing is downloaded: get each from its place, under its "
    "licence. A file with one of the SHA-256 below is the very file that the readers were tested on. "
    "Written by `python tools/sources_page.py`."
)


def page() -> str:
    """The page of sources: a table, and the hashes as ``sha256sum`` writes them."""
    head = ["key", "what", "where", "licence", "the tested file"]
    rows = [[f"`{s.key}`", s.name, s.place, s.licence, s.rows or "not tested"] for s in SOURCES]
    table = Table(head, rows, num_text=len(head)).markdown()
    hashes = "\n".join(f"{s.sha256}  {s.file}" for s in SOURCES if s.sha256)
    parts = ["# Public data and models", INTRODUCTION, table, "## Hashes", f"```text\n{hashes}\n```"]
    return "\n\n".join(parts) + "\n"


def write(_: argparse.Namespace) -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/sources_page.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
