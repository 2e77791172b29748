"""Relative links and anchors of README.md and docs/ lead somewhere, on GitHub and in the built site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def prose(page: Path) -> str:
    """A page without code blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "code", text)


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that are no web addresses."""
    targets = re.findall(r"\]\(([^()\s]*)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings that GitHub and Python-Markdown name alike."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        if re.sub(r"\s", "-", plain) == (slug := re.sub(r"[-\s]+", "-", plain)):
            found.add(slug)
    return found


def broken(page: Path) -> Iterator[str]:
    """What is wrong with a page's links."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(place):
            yield f"{target}: no such heading"
        elif page != ROOT / "README.md" and not (place.is_file() and place.is_relative_to(DOCS)):
            yield f"{target}: no file below docs/, which is all that the site has; name it in backticks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One & two\n\n## exit.json `x`\n")
    page = tmp_path / "b.md"
    page.write_text(
        "[1](a.md#exitjson-x) [2](c.md) [3](a.md#three) [4](#no) `[5](d.md)` [6](https://x.y/z) [7](a.md#one--two)"
    )
    named = [problem.partition(":")[0] for problem in broken(page) if "below docs/" not in problem]
    assert named == ["c.md", "a.md#three", "#no", "a.md#one--two"]


def test_the_site_has_every_page() -> None:
    def files(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                yield from files(inner)

    nav = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(nav) == [page.relative_to(DOCS).as_posix() for page in sorted(DOCS.rglob("*.md"))]
