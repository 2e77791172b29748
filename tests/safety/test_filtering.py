"""The three actions on client shards, and what they make of the red share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.safety.filtering import Action, filter_shards, judge_shards
from fedsim.safety.guard import NoisyOracleGuard, OracleGuard


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
    assert filtered.action.red_share_after(filtered.total) == 0


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


REFUSE = Action("refuse", refusal="I would rather not.")


def test_refuse_replaces_the_response_alone(shards: list[list[SquareRow]]) -> None:
    filtered = filter_shards(shards, judge_shards(OracleGuard(), shards), REFUSE)
    assert filtered.num_kept == (4, 2, 0, 3) and filtered.empty_clients == (2,)
    for before, after in zip(filtered.given, filtered.shards, strict=True):
        for row, left in zip(before, after, strict=True):
            assert left == (replace(row, response="I would rather not.") if row.red else row)
    assert filtered.action.red_share_after(filtered.total) == 0, "a refusal is no red response"


def test_downweight_keeps_the_row_and_lowers_its_weight(shards: list[list[SquareRow]]) -> None:
    filtered = filter_shards(shards, judge_shards(OracleGuard(), shards), Action("downweight", red_weight=0.25))
    assert filtered.num_kept == (4, 2, 0, 3)
    assert [[row.weight for row in shard] for shard in filtered.shards] == [
        [0.25, 1, 0.25, 1], [0.25, 0.25], [], [1, 1, 1],
    ]  # fmt: skip
    assert [[replace(row, weight=1.0) for row in shard] for shard in filtered.shards] == shards
    assert filtered.action.red_share_after(filtered.total) == pytest.approx(1 / 6)  # 4 · 0.25 of 5 + 4 · 0.25


def test_weights_0_and_1_are_drop_and_no_filter(shards: list[list[SquareRow]]) -> None:
    verdicts = judge_shards(NoisyOracleGuard(0.6, 0.4, seed=3), shards)
    dropped = filter_shards(shards, verdicts, Action())
    weightless = filter_shards(shards, verdicts, Action("downweight", red_weight=0.0))
    assert weightless.shards == dropped.shards, "a client may not be left with rows that weigh nothing in all"
    assert weightless.action.red_share_after(dropped.total) == dropped.action.red_share_after(dropped.total)
    whole = filter_shards(shards, verdicts, Action("downweight", red_weight=1.0))
    assert [list(shard) for shard in whole.shards] == shards
    assert whole.action.red_share_after(whole.total) == whole.total.red_share_before


@pytest.mark.parametrize("action", [Action(), REFUSE, Action("downweight", red_weight=0.3)], ids=lambda a: a.name)
def test_the_red_share_after_is_that_of_what_is_trained_on(shards: list[list[SquareRow]], action: Action) -> None:
    verdicts = judge_shards(NoisyOracleGuard(0.6, 0.4, seed=3), shards)
    filtered = filter_shards(shards, verdicts, action)
    assert filtered.total.num_missed > 0 and filtered.total.num_caught > 0, "the case must be able to tell"
    rows = [row for shard in filtered.shards for row in shard]
    red = sum(row.weight for row in rows if row.red and row.response != REFUSE.refusal)
    assert filtered.action.red_share_after(filtered.total) == pytest.approx(red / sum(row.weight for row in rows))
    assert filtered.total == GuardMetrics.of([r.red for r in filtered.judged[0]], filtered.judged[1]), (
        "what the guard is worth does not depend on what is done"
    )


def test_nothing_left_has_no_red_share(make_row: Callable[..., SquareRow]) -> None:
    shards = [[make_row(1, True)]]
    filtered = filter_shards(shards, judge_shards(OracleGuard(), shards), Action())
    assert filtered.action.red_share_after(filtered.total) is None
