"""Tables and the writing of single figures."""

from __future__ import annotations

import pytest

from fedsim.base.tables import Table, duration, number, with_interval


def test_markdown_and_plain() -> None:
    table = Table(["", "a %"], [["left", "1.0"], ["x|y", "22.5"]])
    assert table.markdown() == "|  | a % |\n| --- | ---: |\n| left | 1.0 |\n| x\\|y | 22.5 |"
    assert table.plain() == "      a %\n----  ----\nleft  1.0\nx|y   22.5"


def test_every_row_needs_every_cell() -> None:
    with pytest.raises(AssertionError):
        Table(["a", "b"], [["only one"]])


def test_with_interval() -> None:
    row = {"eval/x": 94.2468, "eval/x_low": 91.64, "eval/x_high": 96.05, "eval/y": 3.0}
    assert with_interval(row, "eval/x", 1) == "94.2 [91.6, 96.0]"
    assert with_interval(row, "eval/y", 2) == "3.00"
    assert with_interval(row, "eval/z", 2) == with_interval(None, "eval/x", 2) == "not measured"


@pytest.mark.parametrize(
    ("value", "text"),
    [(4880.0, "4,880"), (0.123456, "0.123"), (-2.5, "-2.5"), (3303.2, "3,303"), (None, "not measured")],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (59.96, "1 min 00 s"), (192.3, "3 min 12 s"), (3599.7, "1 h 00 min"), (7530.0, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
