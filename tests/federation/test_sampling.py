"""Cohorts and rows: keyed draws without replacement; the learning rate over rounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.federation.sampling import cosine_by_round, sample_cohort, sample_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data())
def test_cohort_is_distinct_sorted_and_keyed(num_clients: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_clients))
    cohort = sample_cohort(num_clients, size, 3, 7)
    assert cohort == sorted(set(cohort)) and len(cohort) == size and set(cohort) <= set(range(num_clients))
    assert cohort == sample_cohort(num_clients, size, 3, 7)


def test_cohorts_differ_by_round_and_seed_and_are_uniform() -> None:
    rounds = [sample_cohort(20, 5, r, 0) for r in range(400)]
    assert len({tuple(c) for c in rounds}) > 390
    assert rounds != [sample_cohort(20, 5, r, 1) for r in range(400)]
    for client in range(20):
        times = sum(client in c for c in rounds)
        assert abs(times - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)


def test_a_smaller_cohort_is_part_of_a_larger_one() -> None:
    assert set(sample_cohort(20, 3, 5, 0)) < set(sample_cohort(20, 8, 5, 0))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(0, 100))
def test_rows_repeat_only_after_all_were_used(num_rows: int, wanted: int) -> None:
    drawn = sample_rows(num_rows, wanted, 2, 4, 0)
    assert len(drawn) == wanted
    for start in range(0, wanted, num_rows):
        epoch = drawn[start : start + num_rows]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(num_rows))


def test_rows_belong_to_client_round_and_seed() -> None:
    base = sample_rows(100, 50, 2, 4, 0)
    others = [sample_rows(100, 50, 3, 4, 0), sample_rows(100, 50, 2, 5, 0), sample_rows(100, 50, 2, 4, 1)]
    assert all(other != base for other in others) and len({tuple(o) for o in others}) == 3
    assert sample_rows(100, 80, 2, 4, 0)[:50] == base, "more steps do not change the first ones"
    second = sample_rows(20, 40, 0, 0, 0)
    assert second[:20] != second[20:], "every epoch has its own order"


def test_cosine_endpoints_and_formula() -> None:
    assert cosine_by_round(0, 50, 5e-5, 1e-6) == pytest.approx(5e-5)
    assert cosine_by_round(50, 50, 5e-5, 1e-6) == pytest.approx(1e-6)
    assert cosine_by_round(25, 50, 5e-5, 1e-6) == pytest.approx((5e-5 + 1e-6) / 2)
    rates = [cosine_by_round(r, 50, 5e-5, 1e-6) for r in range(51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi / 5)))
