"""Units of generation: every row once, the same on any number of ranks, and few steps on the busiest rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.planner import deal_units
from fedsim.generate import batching as units_module
from fedsim.generate.batching import FEWEST, LONGEST_ROWS, MORE, generation_units, num_units


def steps_of_unit(replies: Sequence[int], num_slots: int) -> int:
    """Steps of decoding: rows begin in order as slots become free; a step gives each busy slot a token."""
    ends = [0] * min(num_slots, len(replies))
    for length in replies:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends, default=0)


def busiest(units: list[list[int]], costs: list[float], replies: Sequence[int], num_slots: int, ranks: int) -> int:
    """Steps of the rank that takes the most."""
    shares = deal_units(costs, ranks)
    return max(sum(steps_of_unit([replies[i] for i in units[u]], num_slots) for u in share) for share in shares)


def drawn(num_rows: int, mean: float, limit: int, turns: int, seed: int) -> list[int]:
    """Assumed lengths of whole dialogues: log-normal replies around ``mean`` tokens, cut at the limit."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - 0.32, 0.8, size=(num_rows, turns))
    return np.minimum(draws.astype(int) + 1, limit).sum(axis=1).tolist()


BENCHMARKS = {  # rows, mean reply, limit, turns
    "AdvBench": (520, 200, 1024, 1),
    "HHH": (438, 5, 16, 1),
    "MT-Bench": (80, 350, 1024, 2),
    "XSTest": (450, 120, 256, 1),
}


def steps(names: Sequence[str], num_slots: int, ranks: int, seed: int) -> tuple[int, int]:
    """Steps of the busiest rank, and of the longest dialogue, with all rows of these benchmarks in one pool."""
    replies: list[int] = []
    most_new: list[int] = []
    for name in names:
        num_rows, mean, limit, turns = BENCHMARKS[name]
        replies += drawn(num_rows, mean, limit, turns, seed)
        most_new += [limit * turns] * num_rows
    return steps_of_rows(replies, most_new, num_slots, ranks, seed), max(replies)


def steps_of_rows(replies: Sequence[int], most_new: Sequence[int], num_slots: int, ranks: int, seed: int) -> int:
    """Steps of the busiest rank for rows of these lengths and limits, with prompts of 40 to 79 tokens."""
    prompts = np.random.default_rng(seed + 1).integers(40, 80, size=len(replies)).tolist()
    units = generation_units(prompts, most_new, num_slots)
    costs = [float(sum(prompts[i] + most_new[i] for i in unit)) for unit in units]
    return busiest(units, costs, replies, num_slots, ranks)


@pytest.mark.parametrize("seed", range(5))
def test_advbench_on_four_ranks_takes_as_long_as_its_longest_reply(seed: int) -> None:
    """At 128 slots the four units have 130 rows: two of each wait, and for hardly more than the longest reply."""
    found, longest = steps(["AdvBench"], 128, 4, seed)
    assert found <= max(longest, 1024) + 6 == 1030


@pytest.mark.parametrize("seed", range(5))
def test_a_pool_takes_four_ranks_no_longer_than_its_longest_dialogue(seed: int) -> None:
    """MT-Bench's two turns of 1,024 tokens hide all other benchmarks, whose steps would add up one by one."""
    found, longest = steps(list(BENCHMARKS), 128, 4, seed)
    assert found <= longest + 6
    alone = sum(steps([name], 128, 4, seed)[0] for name in BENCHMARKS)
    assert alone > 1.5 * found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_pool_is_never_slower_than_its_benchmarks_one_by_one(ranks: int) -> None:
    for seed in range(5):
        alone = sum(steps([name], 128, ranks, seed)[0] for name in BENCHMARKS)
        assert steps(list(BENCHMARKS), 128, ranks, seed)[0] < alone


def test_many_rows_keep_all_slots_busy() -> None:
    """CAI's 20,000 conversations of three turns: at most a tenth above the tokens that four times 128 slots make."""
    replies = drawn(20_000, 150, 512, 3, 0)
    units = generation_units([60] * 20_000, [1536] * 20_000, 128)
    costs = [float(len(unit)) for unit in units]
    assert busiest(units, costs, replies, 128, 4) < 1.1 * sum(replies) / (4 * 128)


@pytest.mark.parametrize("num_rows", [8_200, 12_000, 20_000])
@pytest.mark.parametrize("seed", range(2))
def test_a_long_call_keeps_eight_ranks_busy(num_rows: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAI's conversations: eight ranks take hardly more than half as long as four, which lose a tenth at most."""
    replies, most_new = drawn(num_rows, 150, 512, 3, seed), [1536] * num_rows
    four, eight = (steps_of_rows(replies, most_new, 128, ranks, seed) for ranks in (4, 8))
    monkeypatch.setattr(units_module, "MORE", ())
    with_four_units = steps_of_rows(replies, most_new, 128, 4, seed)
    assert four < 1.1 * with_four_units
    assert eight < 0.6 * with_four_units


@pytest.mark.parametrize("num_slots", [32, 64, 128])
def test_four_units_of_an_evaluation_are_enough_for_eight_ranks(
    num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its longest dialogue bounds any number of ranks; with eight units four ranks would take almost twice as long."""
    (four, longest), (eight, _) = (steps(list(BENCHMARKS), num_slots, ranks, 0) for ranks in (4, 8))
    assert eight == four < 1.1 * longest
    monkeypatch.setattr(units_module, "num_units", lambda *_: 8)
    assert steps(list(BENCHMARKS), num_slots, 8, 0)[0] == longest
    assert steps(list(BENCHMARKS), num_slots, 4, 0)[0] > 1.7 * four


def test_an_evaluation_with_few_slots_keeps_eight_ranks_busy() -> None:
    """At 16 slots its work is longer than its longest dialogue."""
    four, eight = (steps(list(BENCHMARKS), 16, ranks, 0)[0] for ranks in (4, 8))
    assert eight < 0.6 * four


@pytest.mark.parametrize(
    ("num_rows", "count"),
    [(0, 0), (1, 1), (128, 1), (129, 2), (512, 4), (513, 4), (128 * 63, 4), (128 * 64, 8), (20_000, 8),
     (128 * 255, 8), (128 * 256, 16), (10**6, 16)],
)  # fmt: skip
def test_units_are_batches_then_four_then_more_where_each_is_long(num_rows: int, count: int) -> None:
    assert num_units([1024] * num_rows, 128) == count


@pytest.mark.parametrize(("num_long", "count"), [(0, 8), (128 * 16, 8), (64, 4)])
def test_a_few_long_rows_among_many_short_ones_make_no_more_units(num_long: int, count: int) -> None:
    """64 batches of 16-token answers: beside rows of 2,048 tokens the call is no longer than one of these."""
    assert num_units([2048] * num_long + [16] * (128 * 64 - num_long), 128) == count


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 99), st.sampled_from([16, 256, 2048])), max_size=300), st.integers(1, 40))
def test_units_hold_every_row_once_and_rows_of_every_kind(rows: list[tuple[int, int]], batch_size: int) -> None:
    """Sizes differ by one row at most, in all and of each kind; what may be longest begins first."""
    lengths, most_new = [length for length, _ in rows], [new for _, new in rows]
    units = generation_units(lengths, most_new, batch_size)
    assert sorted(i for unit in units for i in unit) == list(range(len(rows)))
    assert len(units) <= MORE[0][0] and all(units)
    if len(units) > FEWEST:
        most = sum(most_new) / len(units) / batch_size
        assert len(rows) > (dict(MORE)[len(units)] - 1) * batch_size * len(units)
        assert most >= LONGEST_ROWS * max(most_new)
    for kind in {*most_new}:
        counts = [sum(most_new[i] == kind for i in unit) for unit in units]
        assert max(counts) - min(counts) <= 1
    for unit in units:
        ranked = [(-most_new[i], -lengths[i], i) for i in unit]
        assert ranked == sorted(ranked)
