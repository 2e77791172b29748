"""Partitions: all rows dealt once, even sizes, and an even number of red rows where that is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.config import FederationConfig, load_config
from fedsim.data.partition import fill, partition_rows
from fedsim.data.square import SquareRow
from fedsim.extend import build


def deal(
    red: Sequence[bool],
    num_clients: int,
    kind: str,
    seed: int,
    *,
    categories: Sequence[str] = (),
    concentration: float = 10.0,
    alpha: float = 1.0,
) -> list[list[int]]:
    """A partition of fedsim's own, of rows with these labels and categories."""
    tags = [(name,) for name in categories] or [()] * len(red)
    rows = [SquareRow(i, "", "", label, tag, "") for i, (label, tag) in enumerate(zip(red, tags, strict=True))]
    keys = FederationConfig(beta_concentration=concentration, dirichlet_alpha=alpha)
    return partition_rows(rows, num_clients, build("federation.partition", kind, {}, {"federation": keys}), kind, seed)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.data(), st.sampled_from(["iid", "fixed_red_share"]))
def test_all_rows_once_in_even_sizes(red: list[bool], data: st.DataObject, kind: str) -> None:
    num_clients = data.draw(st.integers(1, len(red)))
    shards = deal(red, num_clients, kind, seed=3)
    assert len(shards) == num_clients
    assert sorted(i for shard in shards for i in shard) == list(range(len(red)))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    reds = [sum(red[i] for i in shard) for shard in shards]
    if kind == "fixed_red_share":
        assert max(reds) - min(reds) <= 1
    assert shards == deal(red, num_clients, kind, seed=3)


def test_iid_counts_spread_as_random_draws_do() -> None:
    """Red rows of a client are hypergeometric: their variance tells iid from the fixed share."""
    red = [i < 600 for i in range(2000)]
    spread = []
    for seed in range(30):
        reds = [sum(red[i] for i in shard) for shard in deal(red, 20, "iid", seed)]
        assert sum(reds) == 600
        spread.append(sum((r - 30) ** 2 for r in reds) / 20)
    want = 100 * 0.3 * 0.7 * (2000 - 100) / (2000 - 1)
    assert math.isclose(sum(spread) / 30, want, rel_tol=0.2)


def test_a_clients_rows_are_mixed() -> None:
    red = [i < 600 for i in range(2000)]
    for shard in deal(red, 20, "fixed_red_share", 0):
        labels = [red[i] for i in shard]
        assert sum(labels) == 30 and labels != sorted(labels) and labels != sorted(labels, reverse=True)
    assert deal(red, 20, "iid", 0) != deal(red, 20, "iid", 1)


def test_errors_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"federation\.num_clients=5: must be <= the 4 rows .*data\.federated_rows"):
        deal([True] * 4, 5, "iid", 0)
    with pytest.raises(ConfigError, match=r"federation\.partition='iix': must be one of .*; did you mean iid\?"):
        load_config(None, ["federation.partition=iix"])


@pytest.mark.parametrize("dealt", [[[0], [0]], [[0], [4]], [[0], [-1]], [[0]], [[0], [1], [2]]])
def test_a_partition_of_a_user_s_own_deals_each_row_once_at_most(dealt: list[list[int]]) -> None:
    rows = [SquareRow(i, "", "", False, (), "") for i in range(4)]
    with pytest.raises(
        ConfigError, match=r"federation\.partition='my.py:p': must return 2 lists of positions from 0 to 3"
    ):
        partition_rows(rows, 2, lambda *_: dealt, "my.py:p", 0)


def test_a_partition_of_a_user_s_own_may_leave_rows_and_clients_out() -> None:
    rows = [SquareRow(i, "", "", i == 2, (), "") for i in range(4)]
    found = partition_rows(rows, 2, lambda given, *_: [[i for i, row in enumerate(given) if row.red], []], "p", 0)
    assert found == [[2], []]


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

    def drawn(seed: int) -> list[list[int]]:
        return deal(red, num_clients, kind, seed, categories=categories, concentration=skew, alpha=skew)

    shards = drawn(seed)
    assert sorted(i for shard in shards for i in shard) == list(range(len(rows)))
    assert len(shards) == num_clients and all(shards)
    assert shards == drawn(seed)
    if kind == "beta_red_share":
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def spread(kind: str, skew: float) -> float:
    """Standard deviation of the clients' red share (or size, in hundreds of rows), over a set of 2,000."""
    red = [i % 10 < 3 for i in range(2000)]
    shards = deal(red, 20, kind, 5, categories=["r" if r else "a" for r in red], concentration=skew, alpha=skew)
    shares = [len(s) / 100 if kind == "quantity_skew" else sum(red[i] for i in s) / len(s) for s in shards]
    return float(np.std(shares))


@pytest.mark.parametrize("kind", SKEWED)
def test_skew_goes_from_one_end_to_the_other(kind: str) -> None:
    assert spread(kind, 1e6) < 0.01 < spread(kind, 10.0) < spread(kind, 0.5)


def test_drawn_red_shares_are_beta_distributed() -> None:
    """Variance m (1 - m) / (a + b + 1)."""
    red = [i % 10 < 3 for i in range(40_000)]
    shards = deal(red, 400, "beta_red_share", 1, concentration=9.0)
    shares = [sum(red[i] for i in shard) / len(shard) for shard in shards]
    assert np.mean(shares) == pytest.approx(0.3) and np.var(shares) == pytest.approx(0.021, rel=0.15)


def test_sizes_differ_at_equal_red_shares() -> None:
    red = [i % 10 < 3 for i in range(2000)]
    for shard in deal(red, 20, "quantity_skew", 2, alpha=0.5):
        assert abs(sum(red[i] for i in shard) - 0.3 * len(shard)) <= 1


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), min_size=1, max_size=12), st.data())
def test_filled_places_hold_the_total_within_their_room(places: list[tuple[float, int]], data: st.DataObject) -> None:
    wanted, room = np.array([w for w, _ in places]), np.array([r for _, r in places])
    total = data.draw(st.integers(0, int(room.sum())))
    found = fill(wanted, room, total)
    assert found.sum() == total and (found >= 0).all() and (found <= room).all()
