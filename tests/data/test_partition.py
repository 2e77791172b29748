"""Partitions: all rows dealt once, even sizes, and an even number of red rows where that is asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import partition_rows
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
