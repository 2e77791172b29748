"""Texts on the page are escaped, whatever they are, and read back as they were."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.tables import Table
from fedsim.report import html


class Reader(HTMLParser):
    """Collects tags and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


@given(st.text())
def test_no_text_becomes_markup(words: str) -> None:
    reader = Reader()
    reader.feed(html.table(Table(["x"], [[words]]), texts=True))
    reader.close()
    assert reader.tags == ["div", "table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert reader.words == "x" + html.UNSHOWN.sub("\ufffd", words)


def test_hostile_characters_are_replaced() -> None:
    assert html.text('<script>"\x00\x1b\u202e\ud800') == "&lt;script&gt;&quot;" + "\ufffd" * 4
