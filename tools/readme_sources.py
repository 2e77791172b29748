"""Write the README's table of public data sets and models: ``python tools/readme_sources.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.evaluate.sources import SOURCES
from fedsim.launching import Parser, launched
from fedsim.record.blocks import replace_block
from fedsim.record.tables import Table

README = Path(__file__).parents[1] / "README.md"


def sources_markdown() -> str:
    """The README's table, and the hashes as ``sha256sum`` writes them."""
    head = ["key", "what", "where", "licence", "the tested file"]
    rows = [[f"`{s.key}`", s.name, s.place, s.licence, s.rows or "not tested"] for s in SOURCES]
    hashes = "\n".join(f"{s.sha256}  {s.file}" for s in SOURCES if s.sha256)
    return f"{Table(head, rows, num_text=len(head)).markdown()}\n\n```text\n{hashes}\n```"


def updated(readme: str) -> str:
    """The README's text with the table as it should be."""
    return replace_block(readme, "sources", sources_markdown())


def write(_: argparse.Namespace) -> None:
    """Rewrite the README."""
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/readme_sources.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
