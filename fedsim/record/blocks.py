"""Generated blocks of a Markdown page: what stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

import re
from pathlib import Path


def replace_block(page: str, name: str, content: str) -> str:
    """The page with a new content in its block ``name``.

    Raises:
        ValueError: the page does not hold exactly one such block.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{content}\n{end}"
    new, count = re.subn(rf"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must hold one block between {begin} and {end}, holds {count}")
    return new


def write_block(page: Path, name: str, content: str) -> None:
    """:func:`replace_block` on a file."""
    page.write_text(replace_block(page.read_text(encoding="utf-8"), name, content), encoding="utf-8")
