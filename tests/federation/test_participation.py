"""Participants of a round and their rows: cohorts, a single client, all rows in one place; the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import build_algorithm
from fedsim.federation.participation import (
    Participation,
    cosine_by_round,
    sample_cohort,
    sample_rows,
)


@dataclass(frozen=True)
class Row:
    """A training row."""

    name: str


SHARDS = [[Row("a"), Row("b")], [], [], [Row("d"), Row("e"), Row("f")]]


def participation(name: str, **keys: int) -> Participation:
    federation = FederationConfig(algorithm=name, num_clients=4, clients_per_round=3, **keys)  # type: ignore[arg-type]
    return build_algorithm(federation, ServerOptimizerConfig()).participation(federation, seed=5)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "scaffold"])
def test_a_cohort_is_drawn_again(name: str) -> None:
    who = participation(name)
    assert [who.drawn(r) for r in range(20)] == [sample_cohort(4, 3, r, 5) for r in range(20)]
    assert who.shards(SHARDS) == SHARDS and who.num_steps(25) == 25
    assert who.words() == "3 of 4 a round"


def test_local_is_one_client_in_every_round() -> None:
    who = participation("local", local_client=3)
    assert [who.drawn(r) for r in range(3)] == [[3]] * 3
    assert who.shards(SHARDS)[3] == SHARDS[3] and who.num_steps(25) == 25
    assert who.words() == "client 3 only"


def test_centralised_has_all_rows_and_a_cohorts_steps() -> None:
    who = participation("centralised")
    assert [who.drawn(r) for r in range(3)] == [[0]] * 3
    (pool,) = who.shards(SHARDS)
    assert [row.name for row in pool] == list("abdef")
    assert who.num_steps(25) == 75, "as many rows as three clients see"
    assert who.words() == "the rows of 4 in one place"


@pytest.mark.parametrize("client", [1, 2])
def test_a_client_that_cannot_train_is_an_error_that_names_others(client: int) -> None:
    with pytest.raises(
        DataError, match=rf"federation\.local_client={client}: .*partition gave it none.*give one that has: 0, 3$"
    ):
        participation("local", local_client=client).shards(SHARDS)


def test_a_federation_without_any_row_is_an_error() -> None:
    with pytest.raises(DataError, match="no client has, so weaken or drop the guard"):
        participation("local").shards([[], [], [], []])
    with pytest.raises(DataError, match=r"federation\.algorithm=centralised: no client has rows left"):
        participation("centralised").shards([[], [], [], []])


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
