"""Units of generation: every row once, the same on any number of ranks, and few steps on the busiest of four."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.generate.units import BATCHES_A_UNIT, FEWEST, MOST_UNITS, generation_units, num_units
from fedsim.parallel.planner import deal_units


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
    prompts = np.random.default_rng(seed + 1).integers(40, 80, size=len(replies)).tolist()
    units = generation_units(prompts, most_new, num_slots)
    costs = [float(sum(prompts[i] + most_new[i] for i in unit)) for unit in units]
    return busiest(units, costs, replies, num_slots, ranks), max(replies)


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


@pytest.mark.parametrize(
    ("num_rows", "count"),
    [(0, 0), (1, 1), (128, 1), (129, 2), (512, 4), (513, 4), (128 * 127, 4), (128 * 128, 8), (20_000, 8), (10**6, 16)],
)
def test_units_are_batches_then_four_then_more_where_each_is_long(num_rows: int, count: int) -> None:
    assert num_units(num_rows, 128) == count
    assert count <= FEWEST or -(-num_rows // 128) // count >= BATCHES_A_UNIT


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 99), st.sampled_from([16, 256, 2048])), max_size=300), st.integers(1, 40))
def test_units_hold_every_row_once_and_rows_of_every_kind(rows: list[tuple[int, int]], batch_size: int) -> None:
    """Sizes differ by one row at most, in all and of each kind; what may be longest begins first."""
    lengths, most_new = [length for length, _ in rows], [new for _, new in rows]
    units = generation_units(lengths, most_new, batch_size)
    assert sorted(i for unit in units for i in unit) == list(range(len(rows)))
    assert len(units) <= MOST_UNITS and all(units)
    for kind in {*most_new}:
        counts = [sum(most_new[i] == kind for i in unit) for unit in units]
        assert max(counts) - min(counts) <= 1
    for unit in units:
        ranked = [(-most_new[i], -lengths[i], i) for i in unit]
        assert ranked == sorted(ranked)
