"""Filter that each client runs on its own rows before training (paper §4.1), and its actions.

Drop leaves out the rows called unsafe (the paper), refuse replaces their response by a refusal,
downweight lets them count less. An action belongs to a run, not to the verdicts, which runs share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Final

from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.safety.guard import Guard

COUNTS: Final = {"drop": "num_dropped", "refuse": "num_refused", "downweight": "num_downweighted"}
"""Metric that counts the rows of each action."""


@dataclass(frozen=True)
class Action:
    """Treatment of a row that is called unsafe.

    Attributes:
        name: "drop", "refuse" or "downweight".
        refusal: refuse: the response that replaces the row's own.
        red_weight: downweight: the row's weight, 0 to 1. A row of weight 0 is left out, as it would
            not change the model.
    """

    name: str = "drop"
    refusal: str = ""
    red_weight: float = 0.0

    def __post_init__(self) -> None:
        assert self.name in COUNTS and 0 <= self.red_weight <= 1, f"not an action: {self}"

    def on_unsafe(self, row: SquareRow) -> SquareRow | None:
        """Return the row that replaces one called unsafe; None where it is left out."""
        if self.name == "refuse":
            return replace(row, response=self.refusal)
        if self.name == "downweight" and self.red_weight > 0:
            return replace(row, weight=self.red_weight)
        return None  # dropped

    def red_share_after(self, counts: GuardMetrics) -> float | None:
        """Return the share of red responses in the training rows, by weight; None without rows.

        A refused row counts in full, but is no longer red.
        """
        weight = {"drop": 0.0, "refuse": 1.0, "downweight": self.red_weight}[self.name]
        red = counts.num_missed + 0.0  # weight of red rows that remain as they are
        if self.name == "downweight":
            red += self.red_weight * counts.num_caught
        total = counts.num_rows - counts.num_unsafe + weight * counts.num_unsafe
        return red / total if total > 0 else None


@dataclass(frozen=True)
class Filtered:
    """Client shards after the filter.

    Attributes:
        shards: the rows that each client trains on, in their order, as the action left them; empty
            where none is left.
        given: each client's rows as they were.
        verdicts: the guard's verdicts on them, shaped as ``given``.
        action: the action on the rows called unsafe.
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
        """Clients without rows; they skip every round for which they are drawn."""
        return tuple(client for client, shard in enumerate(self.shards) if not shard)

    @cached_property
    def clients(self) -> tuple[GuardMetrics, ...]:
        """Each client's own counts."""
        counts = []
        for shard, verdicts in zip(self.given, self.verdicts, strict=True):
            labels = [row.red for row in shard]
            counts.append(GuardMetrics.of(labels, verdicts))
        return tuple(counts)

    @cached_property
    def judged(self) -> tuple[list[SquareRow], list[Verdict]]:
        """All clients' rows as they were, and their verdicts, in one list each."""
        rows, verdicts = chain.from_iterable(self.given), chain.from_iterable(self.verdicts)
        return list(rows), list(verdicts)

    @cached_property
    def total(self) -> GuardMetrics:
        """Counts over all clients' rows."""
        rows, verdicts = self.judged
        return GuardMetrics.of([row.red for row in rows], verdicts)


def judge_shards(guard: Guard, shards: Sequence[Sequence[SquareRow]]) -> list[list[Verdict]]:
    """Classify every client's rows in one call of the guard.

    Returns:
        Verdicts, shaped as ``shards``.
    """
    verdicts = guard.judge(list(chain.from_iterable(shards)))
    assert len(verdicts) == sum(map(len, shards)), "a guard returns one verdict per row"
    return by_shard(verdicts, shards)


def by_shard(
    verdicts: Sequence[Verdict],
    shards: Sequence[Sequence[SquareRow]],
) -> list[list[Verdict]]:
    """Split the verdicts on all rows into those of each client."""
    rest = iter(verdicts)
    return [list(islice(rest, len(shard))) for shard in shards]


def filter_shards(
    shards: Sequence[Sequence[SquareRow]],
    verdicts: Sequence[Sequence[Verdict]],
    action: Action,
) -> Filtered:
    """Take the action on the rows called unsafe; ``verdicts`` is shaped as ``shards``."""
    after = []  # each client's rows after the action
    for shard, shard_verdicts in zip(shards, verdicts, strict=True):
        kept: list[SquareRow] = []
        for row, verdict in zip(shard, shard_verdicts, strict=True):
            trained = action.on_unsafe(row) if verdict.unsafe else row
            if trained is not None:
                kept.append(trained)
        after.append(tuple(kept))
    return Filtered(tuple(after), tuple(map(tuple, shards)), tuple(map(tuple, verdicts)), action)
