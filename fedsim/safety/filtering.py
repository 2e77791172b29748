"""The filter that each client runs on its own rows before training (paper §4.1), and its three
actions.

Drop leaves out the rows called unsafe (the paper), refuse replaces their response by a refusal,
downweight lets them count less. An action belongs to a run, not to the verdicts, which runs share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.safety.guard import Guard

#: Action → what is counted of it.
COUNTS: Final = {"drop": "num_dropped", "refuse": "num_refused", "downweight": "num_downweighted"}


@dataclass(frozen=True)
class Action:
    """What happens to a row that is called unsafe.

    Attributes:
        name: "drop", "refuse" or "downweight".
        refusal: refuse: the response that takes the place of the row's own.
        red_weight: downweight: the row's weight, 0 to 1. A row of weight 0 could teach nothing and
            is left out.
    """

    name: str = "drop"
    refusal: str = ""
    red_weight: float = 0.0

    def __post_init__(self) -> None:
        assert self.name in COUNTS and 0 <= self.red_weight <= 1, f"not an action: {self}"

    def on_unsafe(self, row: SquareRow) -> SquareRow | None:
        """What a client trains on in the place of a row called unsafe; None where it is left out.
        """
        if self.name == "refuse":
            return replace(row, response=self.refusal)
        if self.name == "downweight" and self.red_weight > 0:
            return replace(row, weight=self.red_weight)
        return None

    def red_share_after(self, counts: GuardMetrics) -> float | None:
        """Share of red responses in what is trained on, by weight: a refused row is there, but no
        longer red.
        """
        weight = {"drop": 0.0, "refuse": 1.0, "downweight": self.red_weight}[self.name]
        red = counts.num_missed + (
            self.red_weight * counts.num_caught if self.name == "downweight" else 0.0
        )
        total = counts.num_rows - counts.num_unsafe + weight * counts.num_unsafe
        return red / total if total > 0 else None


@dataclass(frozen=True)
class Filtered:
    """Client shards after the filter.

    Attributes:
        shards: the rows that each client trains on, in their order, as the action left them; empty
            where none is left.
        given: each client's rows as they were.
        verdicts: what the guard said about them, shaped as ``given``.
        action: what was done to the rows called unsafe.
    """

    shards: tuple[tuple[SquareRow, ...], ...]
    given: tuple[tuple[SquareRow, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    action: Action

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Rows that each client trains on."""
        return tuple(len(shard) for shard in self.shards)

    @property
    def empty_clients(self) -> tuple[int, ...]:
        """Clients with nothing left; they sit out every round they are drawn for."""
        return tuple(client for client, shard in enumerate(self.shards) if not shard)

    @cached_property
    def clients(self) -> tuple[GuardMetrics, ...]:
        """Each client's own counts."""
        pairs = zip(self.given, self.verdicts, strict=True)
        return tuple(GuardMetrics.of([row.red for row in shard], judged) for shard, judged in pairs)

    @cached_property
    def judged(self) -> tuple[list[SquareRow], list[Verdict]]:
        """All clients' rows as they were, and their verdicts, in one list each."""
        return [row for shard in self.given for row in shard], [
            v for judged in self.verdicts for v in judged
        ]

    @cached_property
    def total(self) -> GuardMetrics:
        """Counts over all clients' rows."""
        rows, verdicts = self.judged
        return GuardMetrics.of([row.red for row in rows], verdicts)


def judge_shards(guard: Guard, shards: Sequence[Sequence[SquareRow]]) -> list[list[Verdict]]:
    """Verdicts on every client's rows, shaped as ``shards``; all rows go through the guard in one
    call.
    """
    verdicts = guard.judge([row for shard in shards for row in shard])
    assert len(verdicts) == sum(map(len, shards)), "a guard returns one verdict per row"
    rest = iter(verdicts)
    return [[next(rest) for _ in shard] for shard in shards]


def filter_shards(
    shards: Sequence[Sequence[SquareRow]],
    verdicts: Sequence[Sequence[Verdict]],
    action: Action,
) -> Filtered:
    """Take the action on the rows called unsafe; ``verdicts`` is shaped as ``shards``."""
    after = []
    for shard, judged in zip(shards, verdicts, strict=True):
        done = [
            action.on_unsafe(row) if v.unsafe else row for row, v in zip(shard, judged, strict=True)
        ]
        after.append(tuple(row for row in done if row is not None))
    return Filtered(tuple(after), tuple(map(tuple, shards)), tuple(map(tuple, verdicts)), action)
