"""The filter that each client runs on its own rows before training: unsafe ones are dropped (paper §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.data.square import SquareRow
from fedsim.safety.guard import Guard
from fedsim.safety.verdict import GuardMetrics, Verdict


@dataclass(frozen=True)
class Filtered:
    """Client shards after the filter.

    Attributes:
        shards: the rows kept by each client, in their order; empty where nothing is left.
        clients: each client's own counts.
        total: counts over all clients' rows.
    """

    shards: tuple[tuple[SquareRow, ...], ...]
    clients: tuple[GuardMetrics, ...]
    total: GuardMetrics

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Rows that each client trains on."""
        return tuple(len(shard) for shard in self.shards)

    @property
    def empty_clients(self) -> tuple[int, ...]:
        """Clients with nothing left; they sit out every round they are drawn for."""
        return tuple(client for client, shard in enumerate(self.shards) if not shard)


def judge_shards(guard: Guard, shards: Sequence[Sequence[SquareRow]]) -> list[list[Verdict]]:
    """Verdicts on every client's rows, shaped as ``shards``; all rows go through the guard in one call."""
    verdicts = guard.judge([row for shard in shards for row in shard])
    assert len(verdicts) == sum(map(len, shards)), "a guard returns one verdict per row"
    rest = iter(verdicts)
    return [[next(rest) for _ in shard] for shard in shards]


def drop_unsafe(shards: Sequence[Sequence[SquareRow]], verdicts: Sequence[Sequence[Verdict]]) -> Filtered:
    """Keep the rows judged safe; ``verdicts`` is shaped as ``shards``."""
    kept = tuple(
        tuple(row for row, verdict in zip(shard, judged, strict=True) if not verdict.unsafe)
        for shard, judged in zip(shards, verdicts, strict=True)
    )
    clients = tuple(
        GuardMetrics.of([row.red for row in shard], judged) for shard, judged in zip(shards, verdicts, strict=True)
    )
    labels = [row.red for shard in shards for row in shard]
    return Filtered(kept, clients, GuardMetrics.of(labels, [v for judged in verdicts for v in judged]))
