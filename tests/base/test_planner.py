"""Placement of clients: known makespans, invariants of a plan, and the best plans found by brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.planner import (
    FORGOTTEN,
    Job,
    Plan,
    SharedSteps,
    _place,
    deal_units,
    learned_cost,
    learned_sharing,
    plan_round,
    speedup,
)

COSTS = st.lists(st.sampled_from([1e-4, 2e-4, 3.3e-4]), min_size=1, max_size=5)
TOKENS = st.lists(st.integers(1, 5000), min_size=1, max_size=9)


def plan(tokens: list[int], cost: list[float], micro: int = 4, wide: bool = True) -> Plan:
    return plan_round(dict(enumerate(tokens)), cost, micro, wide_lanes=wide)


def width(job: Job) -> int:
    return job.width


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


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.74, 0.76, 3.0])
def test_sharing_is_worth_what_it_saves(cost: float) -> None:
    """5 equal clients on 4 ranks: the fifth on all takes 1/4 of its time and what its steps cost more, alone 1."""
    tokens, steps = dict.fromkeys(range(5), 1000), 25
    shared = SharedSteps(dict.fromkeys(range(5), steps), cost / steps)
    found = plan_round(tokens, [1e-3] * 4, 4, wide_lanes=True, shared=shared)
    assert found.makespan_s == pytest.approx(min(1.25 + cost, 2.0))
    assert max(job.width for job in found.jobs) == (4 if cost < 0.75 else 1)


@pytest.mark.parametrize("extra", [0.0, 0.002, 0.02])
@pytest.mark.parametrize("seed", range(3))
def test_both_costs_are_learned_from_rounds(extra: float, seed: int) -> None:
    """Rounds that take tokens · cost / speed-up, and more in each shared step, lead to these two figures."""
    draws = random.Random(seed)
    real, cost, sharing = 1e-4, (1.5e-4,) * 4, 0.0
    for _ in range(40):
        tokens = {client: draws.randrange(40_000, 60_000) for client in range(5)}
        shared = SharedSteps(dict.fromkeys(tokens, 25), sharing)
        plan = _place(sorted(tokens, key=lambda c: -tokens[c]), 4, [4], tokens, cost, 4, shared)
        took = {
            job.client: tokens[job.client] * real / speedup(job.width, 4) + (25 * extra if job.width > 1 else 0.0)
            for job in plan.jobs
        }
        busy = [sum(took[job.client] for job in plan.jobs if rank in job.ranks) for rank in range(4)]
        cost = learned_cost(cost, busy, plan, tokens, 4, shared)
        sharing = learned_sharing(shared, took, plan, tokens, cost, 4)
    assert sharing == pytest.approx(extra, rel=0.01, abs=1e-5)
    assert cost == pytest.approx((real,) * 4, rel=0.01)


def test_each_wide_job_is_measured_by_hand() -> None:
    """One client of 100 tokens and 5 steps on two ranks: 50 s of tokens and 5 s of steps, where 1.25 s were known."""
    tokens, shared = {0: 100}, SharedSteps({0: 5}, 0.25)
    wide = plan_round(tokens, [1.0, 1.0], 4, wide_lanes=True)
    assert learned_sharing(shared, {0: 55.0}, wide, tokens, [1.0, 1.0], 4) == pytest.approx(0.5 * 0.25 + 0.5 * 1.0)
    assert learned_sharing(shared, {0: 45.0}, wide, tokens, [1.0, 1.0], 4) == 0.125, "never below 0"
    assert learned_cost([1.0, 1.0], [61.25, 51.25], wide, tokens, 4, shared) == pytest.approx((1.1, 1.0))


def test_a_cost_that_is_not_measured_is_forgotten_slowly() -> None:
    tokens, shared = {0: 100, 1: 100}, SharedSteps({0: 5, 1: 5}, 0.25)
    plan = plan_round(tokens, [1.0, 1.0], 4, wide_lanes=False)
    want = 0.25 * (1 - FORGOTTEN)
    assert learned_sharing(shared, {}, plan, tokens, [1.0, 1.0], 4) == want
    wide = plan_round({0: 100}, [1.0, 1.0], 4, wide_lanes=True)
    assert learned_sharing(shared, {}, wide, {}, [1.0, 1.0], 4) == want, "its client failed"
    assert learned_sharing(SharedSteps({0: 5}), {}, plan, tokens, [1.0, 1.0], 4) == 0.0


def test_one_bad_measurement_does_not_end_wide_lanes() -> None:
    """Sharing is worth it below 0.75 client times: four times as much is given up until 0.95^n · 4 < 1."""
    tokens, rounds = dict.fromkeys(range(5), 1000), 0
    shared = SharedSteps(dict.fromkeys(range(5), 25), 4 * 0.75 / 25)
    while max((plan := plan_round(tokens, [1e-3] * 4, 4, wide_lanes=True, shared=shared)).jobs, key=width).width == 1:
        shared = SharedSteps(shared.num, learned_sharing(shared, {}, plan, tokens, [1e-3] * 4, 4))
        rounds += 1
    assert rounds == math.ceil(math.log(4) / -math.log(1 - FORGOTTEN)) == 28


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
