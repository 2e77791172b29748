"""The drop action on client shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fedsim.data.square import SquareRow
from fedsim.safety.filtering import Action, filter_shards, judge_shards
from fedsim.safety.guard import NoisyOracleGuard, OracleGuard
from fedsim.safety.verdict import GuardMetrics, Verdict


@pytest.fixture()
def shards(make_row: Callable[..., SquareRow]) -> list[list[SquareRow]]:
    """Four clients: mixed, all red, no rows, all acceptable."""
    red = [[1, 0, 1, 0], [1, 1], [], [0, 0, 0]]
    numbers = iter(range(100))
    return [[make_row(next(numbers), bool(label)) for label in client] for client in red]


def test_perfect_filter(shards: list[list[SquareRow]]) -> None:
    filtered = filter_shards(shards, judge_shards(OracleGuard(), shards), Action())
    assert filtered.shards == ((shards[0][1], shards[0][3]), (), (), tuple(shards[3]))
    assert filtered.num_kept == (2, 0, 0, 3)
    assert filtered.empty_clients == (1, 2)
    assert filtered.total == GuardMetrics(num_caught=4, num_false_alarms=0, num_missed=0, num_passed=5)
    assert filtered.clients[0] == GuardMetrics(2, 0, 0, 2)
    assert filtered.total.red_share_after == 0


def test_client_counts_add_up(shards: list[list[SquareRow]]) -> None:
    filtered = filter_shards(shards, judge_shards(NoisyOracleGuard(0.6, 0.4, seed=3), shards), Action())
    for name in ("num_caught", "num_false_alarms", "num_missed", "num_passed"):
        assert sum(getattr(client, name) for client in filtered.clients) == getattr(filtered.total, name)
    for shard, kept, client in zip(shards, filtered.shards, filtered.clients, strict=True):
        assert len(shard) - len(kept) == client.num_unsafe


def test_every_row_goes_through_the_guard_once_and_in_order(shards: list[list[SquareRow]]) -> None:
    seen: list[list[int]] = []

    class Counting:
        """Remembers what it was asked."""

        def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
            seen.append([row.row_id for row in rows])
            return [Verdict(False, row.row_id / 100) for row in rows]

    verdicts = judge_shards(Counting(), shards)
    assert seen == [list(range(9))]
    assert [[v.unsafe_prob for v in client] for client in verdicts] == [
        [row.row_id / 100 for row in shard] for shard in shards
    ]


def test_shapes_must_agree(shards: list[list[SquareRow]]) -> None:
    with pytest.raises(ValueError):
        filter_shards(shards, [[]], Action())
