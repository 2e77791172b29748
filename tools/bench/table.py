"""The table of benchmark rows: ours, peer, ratio, target, floor."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.record.tables import Table
from tools.bench.rows import Row, StageResult, Target

NONE = "–"
HEAD = ("stage", "what", "peer", "ours p50", "peer p50", "ratio", "figures", "target", "floor", "of floor")


def table(results: Sequence[StageResult]) -> Table:
    """One line a row."""
    return Table(HEAD, [_line(row) for result in results for row in result.rows], num_text=3)


def readme_table(results: Sequence[StageResult]) -> Table:
    """The rows that have a target, without what the rows' files say better."""
    head = ("stage", "what", "peer", "ours", "peer's", "target", "measured", "of floor")
    rows = []
    for row in (row for result in results for row in result.rows if row.target is not None):
        assert row.target is not None
        value, cells = row.figure(row.target.figure), _line(row)
        goal_met = {True: "", False: " (missed)", None: ""}[row.reached]
        shown = NONE if value is None else f"{value:.3g}{goal_met}"
        rows.append([*cells[:5], goal(row.target, None), shown, cells[-1]])
    return Table(head, rows, num_text=3)


def _line(row: Row) -> list[str]:
    fraction = row.fraction_of_floor
    return [
        row.stage,
        row.name,
        row.peer or NONE,
        NONE if row.seconds is None else seconds(row.seconds.p50),
        row.peer_absent or NONE if row.peer_seconds is None else seconds(row.peer_seconds.p50),
        NONE if row.ratio is None else f"{row.ratio:.2f} x",
        ", ".join(f"{name} {value:.3g}" for name, value in row.figures.items()) or NONE,
        NONE if row.target is None else goal(row.target, row.reached),
        NONE if row.floor_s is None else seconds(row.floor_s),
        NONE if fraction is None else f"{100 * fraction:.0f} %",
    ]


def goal(target: Target, reached: bool | None) -> str:
    """``ratio ≥ 1.8: reached``."""
    bound = f"{target.figure} {'≤' if target.at_most else '≥'} {target.value:g}"
    return bound if reached is None else f"{bound}: {'reached' if reached else 'MISSED'}"


def seconds(value: float) -> str:
    """``1.23 s``, ``45.6 ms`` or ``7.89 µs``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"
