"""Small tables of texts, laid out as Markdown or as aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A head and rows of equally many cells: ``num_text`` columns of text, then figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1

    def __post_init__(self) -> None:
        width = len(self.head)
        assert all(len(row) == width for row in self.rows), "a row needs a cell for each column"

    def markdown(self) -> str:
        """Format as a GitHub-style table; figures are aligned to the right."""
        rule = ["---" if i < self.num_text else "---:" for i in range(len(self.head))]
        lines = [self.head, rule]
        for row in self.rows:
            lines.append([cell.replace("|", "\\|") for cell in row])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plain(self) -> str:
        """Format with columns padded by spaces, a rule under the head and no trailing blanks."""
        columns = zip(self.head, *self.rows, strict=True)
        widths = [max(map(len, column)) for column in columns]  # characters
        rule = ["-" * width for width in widths]
        lines = []
        for row in (self.head, rule, *self.rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def measured(row: Mapping[str, Any] | None, name: str) -> float | None:
    """The figure ``name`` of a metric row; None if there is no row or no such figure."""
    if row is None:
        return None
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):  # a bool is an int too
        return None
    return float(value)


def with_interval(row: Mapping[str, Any] | None, name: str, digits: int, unit: str = "") -> str:
    """Format a figure and its 95 % interval, if known: ``94.2 [91.6, 96.0]``, or "not measured"."""
    value = measured(row, name)
    low, high = measured(row, f"{name}_low"), measured(row, f"{name}_high")
    if value is None:
        return NOT_MEASURED
    text = f"{value:.{digits}f}{unit}"
    if low is not None and high is not None:
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def number(value: float | None, digits: int = 3) -> str:
    """A figure in ``digits`` significant digits; whole numbers and those from 1,000 on in full."""
    if value is None:
        return NOT_MEASURED
    if float(value).is_integer() or abs(value) >= 1000:  # in full, with thousands separated
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 12 s`` or ``2 h 05 min``."""
    if seconds < 59.95:  # rounds to less than 60.0 s
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


def byte_size(num_bytes: float) -> str:
    """Format bytes in the largest unit that leaves one or more: ``512 bytes``, ``1.50 KiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"
