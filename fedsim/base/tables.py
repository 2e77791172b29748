"""Small tables of texts, laid out as Markdown or as aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A head and rows of equally many cells; the first ``num_text`` columns are text, the others are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.head) for row in self.rows), "every row needs a cell for each column"

    def markdown(self) -> str:
        """A GitHub-style table; figures are set to the right."""
        rule = ["---" if i < self.num_text else "---:" for i in range(len(self.head))]
        lines = [self.head, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plain(self) -> str:
        """Columns padded with spaces, a rule under the head, no trailing blanks."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        rule = ["-" * width for width in widths]
        padded = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in (self.head, rule, *self.rows)
        )
        return "\n".join(line.rstrip() for line in padded)


def measured(row: Mapping[str, Any] | None, name: str) -> float | None:
    """The figure ``name`` of a metric row; None if there is no row or no such figure."""
    value = None if row is None else row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def with_interval(row: Mapping[str, Any] | None, name: str, digits: int, unit: str = "") -> str:
    """``94.2 [91.6, 96.0]``: figure (and unit) and 95 % interval, the figure alone, or "not measured"."""
    value, low, high = (measured(row, name + ending) for ending in ("", "_low", "_high"))
    if value is None:
        return NOT_MEASURED
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{unit}{interval}"


def number(value: float | None, digits: int = 3) -> str:
    """A figure in ``digits`` significant digits; whole numbers and those from 1,000 on in full."""
    if value is None:
        return NOT_MEASURED
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 12 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


def byte_size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves one or more: ``512 bytes``, ``1.50 KiB``, ``96.00 MiB``, ``2.20 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"
