"""Fixed-point sums: the same bits in any order and grouping, within the stated bound of the exact sum."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.kernels import fixed_point

F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
COLUMN = st.lists(F32, min_size=1, max_size=9)


def exponent_for(values: list[float], count: int | None = None, weight: float = 1.0) -> torch.Tensor:
    bound = torch.tensor(max(abs(v) for v in values), dtype=torch.float64) * abs(weight)
    return fixed_point.shared_exponent(bound, count or len(values))


def total_of(values: list[float], exponent: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.int64)
    vectors = [torch.tensor([value], dtype=torch.float32) for value in values]
    fixed_point.accumulate(total, vectors, [weight] * len(values), exponent)
    return total


def integers_of(vector: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    total = torch.empty(len(vector), dtype=torch.int64)
    fixed_point.accumulate(total, [vector], [1.0], exponent)
    return total


def restored(total: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    return fixed_point.restore(total.clone(), exponent, torch.tensor(1.0, dtype=torch.float64))


@settings(max_examples=300, deadline=None)
@given(COLUMN)
def test_sum_is_within_its_bound_of_the_exact_one(values: list[float]) -> None:
    exponent = exponent_for(values)
    total = total_of(values, exponent)
    exact = sum(map(Fraction, values), Fraction(0))
    error = abs(Fraction(int(total)) / Fraction(2) ** int(exponent) - exact)
    assert error <= len(values) * Fraction(2) ** -(int(exponent) + 1)
    assert abs(int(total)) <= 2**62
    back = Fraction(float(restored(total, exponent)))
    assert abs(back - exact) <= error + abs(exact) * Fraction(2) ** -52 + Fraction(2) ** -1074


@settings(max_examples=200, deadline=None)
@given(COLUMN, st.randoms(use_true_random=False), st.integers(1, 4))
def test_bits_do_not_depend_on_order_or_grouping(values: list[float], random: object, num_members: int) -> None:
    exponent = exponent_for(values)
    want = int(total_of(values, exponent))
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    members = [total_of(shuffled[i::num_members], exponent) for i in range(num_members)]
    assert int(sum(members[1:], members[0])) == want


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6), st.integers(1, 5000))
def test_weights_are_applied_in_fp64(values: list[float], weight: int) -> None:
    exponent = exponent_for(values, weight=weight)
    total = total_of(values, exponent, float(weight))
    exact = sum((Fraction(v) * weight for v in values), Fraction(0))
    error = abs(Fraction(int(total)) / Fraction(2) ** int(exponent) - exact)
    assert error <= len(values) * Fraction(2) ** -(int(exponent) + 1), "24 bits × 13 bits are exact in fp64"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 1000])
@pytest.mark.parametrize("bound", [1.0, 0.9999999, 2.0, 1e-30, 1e30, 3.4e38, 1e-45, 1e308])
def test_no_sum_at_the_bound_overflows(count: int, bound: float) -> None:
    exponent = fixed_point.shared_exponent(torch.tensor(bound, dtype=torch.float64), count)
    one = integers_of(torch.tensor([bound], dtype=torch.float64), exponent)
    assert 0 < count * int(one) <= 2**62
    if bound > 1e-40:
        assert count * int(one) > 2**58, "the scale wastes few bits"
        assert float(restored(one, exponent)) == pytest.approx(bound, rel=1e-14)


def test_terms_of_24_bits_are_exact_down_to_the_stated_size() -> None:
    exponent = fixed_point.shared_exponent(torch.tensor(1.0, dtype=torch.float64), 8)
    smallest = 2.0 ** (24 - int(exponent))
    for value in (smallest, smallest * (1 + 2.0**-23), 0.1, 1.0):
        exact = float(torch.tensor(value, dtype=torch.float32))
        assert float(restored(total_of([exact], exponent), exponent)) == exact


@pytest.mark.parametrize("grids", [0.49, 0.5, 0.51, 0.75, 1.25, 1.5, 1.75, 2.5, 1000.6, -0.49, -0.5, -0.75, -1.5, -1.6])
def test_a_term_goes_to_the_nearest_grid_point(grids: float) -> None:
    exponent = fixed_point.shared_exponent(torch.tensor(1.0, dtype=torch.float64), 2)
    vector = torch.tensor([grids * 2.0 ** -int(exponent)], dtype=torch.float64)
    assert int(integers_of(vector, exponent)) == round(grids), "Python rounds halves to even"


def test_zeros_and_denormals() -> None:
    zero = exponent_for([0.0, 0.0])
    assert int(total_of([0.0, -0.0], zero)) == 0
    denormals = [1e-45, 3e-45, -1e-45]
    exponent = exponent_for(denormals)
    want = sum(float(torch.tensor(v, dtype=torch.float32)) for v in denormals)
    assert float(restored(total_of(denormals, exponent), exponent)) == want


def test_bounds_are_a_vector_of_segments() -> None:
    bounds = torch.tensor([1.0, 0.0, 1e-20, 3e5], dtype=torch.float64)
    together = fixed_point.shared_exponent(bounds, 5)
    assert together.dtype == torch.int32
    assert together.tolist() == [int(fixed_point.shared_exponent(b, 5)) for b in bounds]
    assert together[0] == 62 - math.ceil(math.log2(5)) - 1


@pytest.mark.parametrize(("block", "terms"), [(1, 1), (3, 2), (8, 8), (20, 3), (1 << 17, 8)])
def test_blocks_and_orders_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int, terms: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4, 10)
    exponent = fixed_point.shared_exponent(vectors.abs().max().double() * 3, 4)
    monkeypatch.setattr(fixed_point, "BLOCK", block)
    monkeypatch.setattr(fixed_point, "MAX_TERMS", terms)
    totals = set()
    for order in itertools.permutations(range(4)):
        total = torch.full((10,), 77, dtype=torch.int64)
        fixed_point.accumulate(total, [vectors[i] for i in order], [3.0] * 4, exponent)
        totals.add(tuple(total.tolist()))
    assert len(totals) == 1
    got = restored(torch.tensor(totals.pop()), exponent)
    torch.testing.assert_close(got, 3 * vectors.double().sum(0), rtol=0, atol=2.0**-50)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(F32, st.floats(-1e6, 1e6)), min_size=1, max_size=20))
def test_integers_are_pythons(pairs: list[tuple[float, float]]) -> None:
    """Python's floats are fp64, its ``round`` takes halves to even, and its integers are exact."""
    bound = torch.tensor(max(abs(v * w) for v, w in pairs), dtype=torch.float64)
    exponent = fixed_point.shared_exponent(bound, len(pairs))
    total = torch.empty(1, dtype=torch.int64)
    vectors = [torch.tensor([v], dtype=torch.float32) for v, _ in pairs]
    fixed_point.accumulate(total, vectors, [w for _, w in pairs], exponent)
    assert int(total) == sum(round(v * (w * 2.0 ** int(exponent))) for v, w in pairs)


def test_other_types_and_strides() -> None:
    exponent = fixed_point.shared_exponent(torch.tensor(2.0, dtype=torch.float64), 2)
    total = torch.empty(3, dtype=torch.int64)
    narrow = torch.tensor([1.5, 9.0, -0.25, 9.0, 1.0], dtype=torch.bfloat16)[::2]
    wide = torch.tensor([[0.5, 0.25, 1e-9], [9.0, 9.0, 9.0]], dtype=torch.float64).T[:, 0]
    fixed_point.accumulate(total, [narrow, wide], [1.0, 1.0], exponent)
    want = torch.tensor([2.0, 0.0, 1 + 1e-9], dtype=torch.float64)
    torch.testing.assert_close(restored(total, exponent), want, rtol=0, atol=1e-15)


def test_nothing_to_add_gives_zeros() -> None:
    total = torch.full((5,), 3, dtype=torch.int64)
    fixed_point.accumulate(total, [], [], torch.tensor(4, dtype=torch.int32))
    assert not total.any()
    empty = torch.empty(0, dtype=torch.int64)
    fixed_point.accumulate(empty, [torch.empty(0)], [2.0], torch.tensor(4, dtype=torch.int32))
    assert not len(restored(empty, torch.tensor(4, dtype=torch.int32)))


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-1022, 1024, dtype=torch.int32)
    assert fixed_point.power_of_two(exponents).tolist() == [math.ldexp(1.0, int(e)) for e in exponents]


def test_restoring_takes_no_memory_and_marks_what_has_no_bound() -> None:
    exponent = torch.tensor(3, dtype=torch.int32)
    total = torch.tensor([8, 0, -4])
    sums = fixed_point.restore(total, exponent, torch.tensor(1.0, dtype=torch.float64))
    assert sums.tolist() == [1.0, 0.0, -0.5] and sums.data_ptr() == total.data_ptr()
    total = torch.tensor([8, 0, -4])
    assert fixed_point.restore(total, exponent, torch.tensor(torch.inf, dtype=torch.float64)).isnan().all()
