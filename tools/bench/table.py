"""The table of benchmark rows: ours, peer, ratio, target, floor."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.base.tables import Table
from fedsim.study.bench_rows import Row, StageResult, Target

NONE = "–"
HEAD = ("stage", "what", "peer", "ours p50", "peer p50", "ratio", "figures", "target", "floor", "of floor")


def table(results: Sequence[StageResult]) -> Table:
    """One line a row."""
    return Table(HEAD, [_line(row) for result in results for row in result.rows], num_text=3)


def markdown_table(results: Sequence[StageResult]) -> Table:
    """Every row, without the floor's seconds, which the rows' files have."""
    head = ("stage", "what", "peer", "ours", "peer's", "ratio", "repeats", "figures", "target", "of floor")
    lines = []
    for row in (row for result in results for row in result.rows):
        cells = _line(row)
        lines.append([*cells[:6], str(row.repeats or NONE), *cells[6:8], cells[-1]])
    return Table(head, lines, num_text=3)


def strongest_peers(results: Sequence[StageResult]) -> Table:
    """The peer with the lowest ratio for each piece of work that has one; fedsim's own other ways are no peers."""
    head = ("stage", "what", "strongest peer", "ours", "peer's", "peer's ÷ ours")
    lowest: dict[tuple[str, str], Row] = {}
    for row in (row for result in results for row in result.rows):
        if row.ratio is None or row.peer is None or row.peer.startswith(("ours", "fedsim")):
            continue
        found = lowest.get((row.stage, row.name))
        if found is None or found.ratio is None or row.ratio < found.ratio:
            lowest[row.stage, row.name] = row
    return Table(head, [_line(row)[:6] for row in lowest.values()], num_text=3)


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
