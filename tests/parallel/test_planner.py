"""Placement of clients: known makespans, invariants of a plan, and the best plans found by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.parallel.planner import Plan, deal_units, plan_round, speedup

COSTS = st.lists(st.sampled_from([1e-4, 2e-4, 3.3e-4]), min_size=1, max_size=5)
TOKENS = st.lists(st.integers(1, 5000), min_size=1, max_size=9)


def plan(tokens: list[int], cost: list[float], micro: int = 4, wide: bool = True) -> Plan:
    return plan_round(dict(enumerate(tokens)), cost, micro, wide_lanes=wide)


def lpt(tokens: list[int], cost: list[float]) -> float:
    """Makespan of heaviest-first on single ranks."""
    free = [0.0] * len(cost)
    for work in sorted(tokens, reverse=True):
        rank = min(range(len(cost)), key=lambda r: free[r] + work * cost[r])
        free[rank] += work * cost[rank]
    return max(free)


@pytest.mark.parametrize(
    ("clients", "ranks", "micro", "want"),
    [(5, 4, 4, 1.25), (5, 2, 4, 2.5), (5, 3, 4, 2.0), (3, 2, 4, 1.5), (1, 4, 4, 0.25), (2, 4, 4, 0.5), (4, 4, 4, 1.0),
     (5, 4, 1, 2.0), (5, 4, 2, 1.5), (5, 4, 8, 1.25), (5, 1, 4, 5.0), (6, 4, 4, 1.5), (7, 4, 4, 1.75), (3, 4, 4, 0.75)],
)  # fmt: skip
def test_equal_clients(clients: int, ranks: int, micro: int, want: float) -> None:
    """In client times; a batch of n parts is at best n-fold faster, and ⌈n/width⌉ parts are computed one by one."""
    found = plan([1000] * clients, [1e-3] * ranks, micro)
    assert found.makespan_s == pytest.approx(want)


def test_without_wide_lanes_the_last_wave_waits() -> None:
    found = plan([1000] * 5, [1e-3] * 4, wide=False)
    assert found.makespan_s == pytest.approx(2.0) and found.idle_share == pytest.approx(3 / 8)
    assert {job.width for job in found.jobs} == {1}


def test_idle_share_of_the_papers_round() -> None:
    found = plan([1000] * 5, [1e-3] * 4)
    assert found.idle_share == pytest.approx(0.0)
    assert sorted(job.width for job in found.jobs) == [1, 1, 1, 1, 4]


def test_a_tie_goes_to_single_ranks() -> None:
    assert {job.width for job in plan([1000] * 5, [1e-3] * 3).jobs} == {1}


@settings(max_examples=200, deadline=None)
@given(TOKENS, COSTS, st.integers(1, 9), st.booleans())
def test_invariants(tokens: list[int], cost: list[float], micro: int, wide: bool) -> None:
    found = plan(tokens, cost, micro, wide)
    assert found == plan(tokens, cost, micro, wide), "a pure function"
    assert sorted(job.client for job in found.jobs) == list(range(len(tokens))), "every client once"
    assert found.makespan_s <= lpt(tokens, cost) * (1 + 1e-9)
    assert found.makespan_s == pytest.approx(max(job.end_s for job in found.jobs))
    busy = 0.0
    for rank in range(len(cost)):
        mine = [job for job in found.jobs if rank in job.ranks]
        for before, after in itertools.pairwise(mine):
            assert before.end_s <= after.start_s, "a rank runs its jobs one after the other, in the plan's order"
        busy += sum(job.end_s - job.start_s for job in mine)
    for job in found.jobs:
        assert job.first_rank >= 0 and job.ranks.stop <= len(cost) and job.width >= 1
        slowest = max(cost[r] for r in job.ranks)
        parts = math.ceil(micro / job.width) / micro
        assert job.end_s - job.start_s == pytest.approx(tokens[job.client] * slowest * parts)
    assert found.idle_share == pytest.approx(1 - busy / (len(cost) * found.makespan_s), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_singles_are_near_the_best_by_brute_force(tokens: list[int], ranks: int) -> None:
    """Heaviest first is within 4/3 − 1/(3m) of the best assignment on equal ranks (Graham 1969)."""
    found = plan(tokens, [1.0] * ranks, wide=False).makespan_s
    best = min(
        max(sum(t for t, r in zip(tokens, where, strict=True) if r == rank) for rank in range(ranks))
        for where in itertools.product(range(ranks), repeat=len(tokens))
    )
    assert best - 1e-9 <= found <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.integers(1, 5))
def test_equal_ranks_never_beat_the_ideal(tokens: list[int], ranks: int) -> None:
    assert plan(tokens, [1.0] * ranks, 64).makespan_s >= sum(tokens) / ranks - 1e-6


def test_a_slow_rank_gets_less() -> None:
    found = plan([1000] * 6, [1e-3, 2e-3], wide=False)
    assert sum(job.first_rank == 0 for job in found.jobs) == 4
    assert found.makespan_s == pytest.approx(4.0)


def test_the_plan_does_not_depend_on_the_mappings_order() -> None:
    tokens = {3: 10, 1: 10, 2: 30, 0: 5}
    assert plan_round(tokens, [1.0, 1.0], 4, wide_lanes=True) == plan_round(
        dict(sorted(tokens.items())), [1.0, 1.0], 4, wide_lanes=True
    )


@pytest.mark.parametrize(
    ("width", "micro", "want"), [(1, 4, 1), (2, 4, 2), (3, 4, 2), (4, 4, 4), (5, 4, 4), (2, 5, 5 / 3)]
)
def test_speedup(width: int, micro: int, want: float) -> None:
    assert speedup(width, micro) == pytest.approx(want)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=12), st.integers(1, 5))
def test_units_are_dealt_once_and_evenly(costs: list[float], ranks: int) -> None:
    shares = deal_units(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares) and len(shares) == ranks
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0.0) + 1e-6


def test_equal_units_are_dealt_in_equal_numbers() -> None:
    assert [len(share) for share in deal_units([0.0] * 10, 4)] == [3, 3, 2, 2]
