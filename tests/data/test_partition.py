"""Partitions: all rows dealt once, even sizes, and an even number of red rows where that is asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import fill, partition_rows
from fedsim.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.data(), st.sampled_from(["iid", "fixed_red_share"]))
def test_all_rows_once_in_even_sizes(red: list[bool], data: st.DataObject, kind: str) -> None:
    num_clients = data.draw(st.integers(1, len(red)))
    shards = partition_rows(red, num_clients, kind, seed=3)
    assert len(shards) == num_clients
    assert sorted(i for shard in shards for i in shard) == list(range(len(red)))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    reds = [sum(red[i] for i in shard) for shard in shards]
    if kind == "fixed_red_share":
        assert max(reds) - min(reds) <= 1
    assert shards == partition_rows(red, num_clients, kind, seed=3)


def test_iid_counts_spread_as_random_draws_do() -> None:
    """Red rows of a client are hypergeometric: their variance tells iid from the fixed share."""
    red = [i < 600 for i in range(2000)]
    spread = []
    for seed in range(30):
        reds = [sum(red[i] for i in shard) for shard in partition_rows(red, 20, "iid", seed)]
        assert sum(reds) == 600
        spread.append(sum((r - 30) ** 2 for r in reds) / 20)
    want = 100 * 0.3 * 0.7 * (2000 - 100) / (2000 - 1)
    assert math.isclose(sum(spread) / 30, want, rel_tol=0.2)


def test_a_clients_rows_are_mixed() -> None:
    red = [i < 600 for i in range(2000)]
    for shard in partition_rows(red, 20, "fixed_red_share", 0):
        labels = [red[i] for i in shard]
        assert sum(labels) == 30 and labels != sorted(labels) and labels != sorted(labels, reverse=True)
    assert partition_rows(red, 20, "iid", 0) != partition_rows(red, 20, "iid", 1)


def test_errors_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"federation\.num_clients=5: must be <= the 4 rows .*data\.federated_rows"):
        partition_rows([True] * 4, 5, "iid", 0)
    with pytest.raises(ConfigError, match=r"federation\.partition='x'"):
        partition_rows([True] * 4, 2, "x", 0)


SKEWED = ("beta_red_share", "dirichlet", "quantity_skew")


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=80),
    st.integers(1, 80),
    st.sampled_from(SKEWED),
    st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    st.integers(0, 3),
)
def test_skewed_partitions_deal_every_row_once_and_leave_nobody_without(
    rows: list[tuple[bool, str]], num_clients: int, kind: str, skew: float, seed: int
) -> None:
    num_clients = min(num_clients, len(rows))
    red, categories = [r for r, _ in rows], [c for _, c in rows]

    def deal(seed: int) -> list[list[int]]:
        return partition_rows(red, num_clients, kind, seed, categories=categories, concentration=skew, alpha=skew)

    shards = deal(seed)
    assert sorted(i for shard in shards for i in shard) == list(range(len(rows)))
    assert len(shards) == num_clients and all(shards)
    assert shards == deal(seed)
    if kind == "beta_red_share":
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def spread(kind: str, skew: float) -> float:
    """Standard deviation of the clients' red share (or size, in hundreds of rows), over a set of 2,000."""
    red = [i % 10 < 3 for i in range(2000)]
    shards = partition_rows(
        red, 20, kind, 5, categories=["r" if r else "a" for r in red], concentration=skew, alpha=skew
    )
    shares = [len(s) / 100 if kind == "quantity_skew" else sum(red[i] for i in s) / len(s) for s in shards]
    return float(np.std(shares))


@pytest.mark.parametrize("kind", SKEWED)
def test_skew_goes_from_one_end_to_the_other(kind: str) -> None:
    assert spread(kind, 1e6) < 0.01 < spread(kind, 10.0) < spread(kind, 0.5)


def test_drawn_red_shares_are_beta_distributed() -> None:
    """Variance m (1 - m) / (a + b + 1)."""
    red = [i % 10 < 3 for i in range(40_000)]
    shards = partition_rows(red, 400, "beta_red_share", 1, concentration=9.0)
    shares = [sum(red[i] for i in shard) / len(shard) for shard in shards]
    assert np.mean(shares) == pytest.approx(0.3) and np.var(shares) == pytest.approx(0.021, rel=0.15)


def test_sizes_differ_at_equal_red_shares() -> None:
    red = [i % 10 < 3 for i in range(2000)]
    for shard in partition_rows(red, 20, "quantity_skew", 2, alpha=0.5):
        assert abs(sum(red[i] for i in shard) - 0.3 * len(shard)) <= 1


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), min_size=1, max_size=12), st.data())
def test_filled_places_hold_the_total_within_their_room(places: list[tuple[float, int]], data: st.DataObject) -> None:
    wanted, room = np.array([w for w, _ in places]), np.array([r for _, r in places])
    total = data.draw(st.integers(0, int(room.sum())))
    found = fill(wanted, room, total)
    assert found.sum() == total and (found >= 0).all() and (found <= room).all()
