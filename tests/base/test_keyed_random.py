"""Keyed randomness: equal keys give equal draws, every part of a key counts, draws look uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base import keyed_random

PARTS = st.lists(st.one_of(st.integers(-5, 5), st.text("ab1", max_size=2)), max_size=4)


def test_a_draw_depends_on_its_key_alone() -> None:
    first = keyed_random.generator(7, "rows", 3, "x").random(5)
    keyed_random.generator(7, "rows", 4).random(1000)
    np.random.default_rng(0).random(10)
    assert np.array_equal(first, keyed_random.generator(7, "rows", 3, "x").random(5))


@pytest.mark.parametrize(
    "other",
    [(8, "rows", 1, 2), (7, "row", 1, 2), (7, "rows", 2, 2), (7, "rows", 1, 3), (7, "rows", 1), (7, "rows", 12),
     (7, "rows", 2, 1), (7, "rows", "1", 2), (7, "rows", 1, 2, 0)],
)  # fmt: skip
def test_every_part_counts(other: tuple[int, str, int]) -> None:
    assert keyed_random.derive(*other) != keyed_random.derive(7, "rows", 1, 2)


@settings(max_examples=200, deadline=None)
@given(PARTS, PARTS)
def test_different_places_have_different_keys(one: list[int | str], two: list[int | str]) -> None:
    same = [(type(a), a) for a in one] == [(type(b), b) for b in two]
    assert (keyed_random.derive(0, "p", *one) == keyed_random.derive(0, "p", *two)) == same


def test_derived_integers_are_uniform_in_63_bits() -> None:
    values = np.array([keyed_random.derive(0, "u", i) for i in range(4000)], dtype=np.float64) / 2.0**63
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 45, "chi-square, 19 degrees of freedom, p = 0.001"


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    streams = np.stack([keyed_random.generator(0, "dropout", i).random(2000) for i in range(12)])
    off_diagonal = np.corrcoef(streams)[~np.eye(12, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(2000)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 9))
def test_permutation_is_one(num: int, seed: int) -> None:
    order = keyed_random.permutation(num, seed, "p")
    assert sorted(order.tolist()) == list(range(num))
    assert np.array_equal(order, keyed_random.permutation(num, seed, "p"))
