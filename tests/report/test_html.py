"""Texts on the page are escaped, whatever they are, and read back as they were; a value that is missing is an error."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from fedsim.base.tables import Table
from fedsim.report.build import UNSHOWN, Shown, render

SKELETON = ["html", "head", "meta", "meta", "title", "style", "body", "main", "h1"]


def values(words: str) -> dict[str, Any]:
    """A page's values with ``words`` in every place that takes a text."""
    table = Table([words], [[words]])
    run = {"title": words, "controls": [words], "guard": table, "samples": table, "num_categories": 1}
    names = ("compared", "losses", "times", "idle", "costs")
    return {
        "title": words,
        "headlines": [words],
        "notes": [words],
        "paper": table,
        "paper_caption": words,
        "together": table,
        "unlike": table,
        "runs": [{**run, "manifest": words}],
        **{name: [Shown("data:image/png;base64,", words, words)] for name in names},
    }


class Reader(HTMLParser):
    """Collects tags, pictures' words and the text of each element."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.alts: list[str | None] = []
        self.words: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.words.setdefault(tag, []).append("")
        self.alts += [value for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.words[self.tags[-1]][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


@given(st.text())
def test_no_text_becomes_markup(words: str) -> None:
    reader = read(render(values(f"a{words}b")))
    assert reader.tags == read(render(values("x"))).tags
    shown = "a" + UNSHOWN.sub("\ufffd", words) + "b"
    assert reader.alts == [shown] * 5
    assert [text.strip() for text in reader.words["pre"]] == [shown]
    assert reader.words["h1"][0].startswith(shown) and reader.words["td"][-1].startswith(shown)


@pytest.mark.parametrize("words", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "'", "{{ 7 * 7 }}", "&lt;"])
def test_a_run_may_have_any_name(words: str) -> None:
    page = render(values(words))
    assert read(page).words["title"][0].strip() == words and "<script" not in page and "onerror=y>" not in page


def test_hostile_characters_are_replaced() -> None:
    page = render(values("<b>\x00\x1b\u202e\ud800"))
    assert "<title>&lt;b&gt;\ufffd\ufffd\ufffd\ufffd</title>" in page


def test_an_empty_section_is_left_out() -> None:
    lists = ("headlines", "notes", "compared", "losses", "times", "idle", "costs")
    bare = values("x") | {name: [] for name in lists}
    bare |= {"runs": [], "paper": None, "together": None, "unlike": None}
    assert read(render(bare)).tags == SKELETON


def test_a_value_that_is_missing_is_an_error() -> None:
    given = values("x")
    del given["paper_caption"]
    with pytest.raises(UndefinedError, match="paper_caption"):
        render(given)
