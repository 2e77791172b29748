"""Wilson and Student intervals against closed forms and table values."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.evaluate.intervals import Z_95, Mean, Rate, Slope, t_95


def test_interval_of_438_items_is_4_7_points() -> None:
    low, high = Rate(219, 438).percent_interval
    assert (high - low) / 2 == pytest.approx(4.7, abs=0.05)
    assert (low + high) / 2 == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_published_wilson_values(successes: int, total: int, low: float, high: float) -> None:
    assert Rate(successes, total).interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_equation(counts: tuple[int, int]) -> None:
    """Wilson's ends are the p with |p̂ − p| = z · √(p(1 − p)/n); at 0 and at n one end is the bound itself."""
    rate = Rate(*counts)
    low, high = rate.interval
    assert 0 <= low <= rate.value <= high <= 1
    for end, bound in ((low, rate.successes == 0), (high, rate.successes == rate.total)):
        distance = 0.0 if bound else Z_95 * math.sqrt(end * (1 - end) / rate.total)
        assert abs(rate.value - end) == pytest.approx(distance, abs=1e-9)


def test_a_rate_shows_its_count() -> None:
    assert str(Rate(228, 438)) == "52.1 % [47.4, 56.7] of 438"
    assert Rate.of([True, False, True]) == Rate(2, 3)
    with pytest.raises(AssertionError):
        Rate(0, 0)
    with pytest.raises(AssertionError):
        Rate(3, 2)


@pytest.mark.parametrize(
    ("freedom", "point"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (29, 2.0452), (79, 1.9905)],
)
def test_student_points_of_the_tables(freedom: int, point: float) -> None:
    assert t_95(freedom) == pytest.approx(point, abs=5e-5)


def test_student_tends_to_normal() -> None:
    """t = z + (z³ + z)/4n + O(n⁻²) for n degrees of freedom."""
    for freedom in (1000, 1001):
        assert t_95(freedom) == pytest.approx(Z_95 + (Z_95**3 + Z_95) / (4 * freedom), abs=1e-5)


def test_mean_with_its_interval() -> None:
    mean = Mean.of([1, 2, 3, 4, 5])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (mean.value, mean.low, mean.high, mean.count) == pytest.approx((3, 3 - half, 3 + half, 5))
    assert Mean.of([7.0]) == Mean(7.0, 7.0, 7.0, 1)
    assert Mean.of([4.0] * 9) == Mean(4.0, 4.0, 4.0, 9)
    assert Mean.of([0.1] * 3 + [0.2] * 3) == Mean.of([0.2, 0.1] * 3)  # the order does not matter


def test_groups_of_one_size_are_as_wide_as_their_means() -> None:
    groups = [[1.0, 2.0], [5.0, 4.0], [9.0, 3.0], [7.0, 7.0]]
    found, expected = Mean.of_groups(groups), Mean.of([1.5, 4.5, 6.0, 7.0])
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-12)
    copies = Mean.of_groups([[v] * 3 for v in (1.0, 4.0, 6.0)])  # repeating what is known narrows nothing
    assert astuple(copies) == pytest.approx(astuple(Mean.of([1, 4, 6])), rel=1e-12)


def test_groups_of_different_sizes_by_hand() -> None:
    """Ratio estimator: mean 12/3 = 4, residual sums (2 − 4) + (4 − 4) and 6 − 4, variance 2/1 · ((−2)² + 2²) / 3²."""
    mean = Mean.of_groups([[2.0, 4.0], [6.0]])
    half = 12.7062047 * math.sqrt(2 * 8) / 3
    assert astuple(mean) == pytest.approx((4.0, 4 - half, 4 + half, 2), rel=1e-7)
    assert Mean.of_groups([[3.0, 5.0]]) == Mean(4.0, 4.0, 4.0, 1)
    for nothing in ([], [[1.0], []]):
        with pytest.raises(AssertionError):
            Mean.of_groups(nothing)


def test_slope_by_hand() -> None:
    """Values 0, 1, 2, 5: slope Σ(x − x̄)(y − ȳ)/Σ(x − x̄)² = 8/5, residuals 0.4, −0.2, −0.8, 0.6, s² = 1.2/2."""
    found = Slope.of([0, 1, 2, 5])
    half = 4.3026527 * math.sqrt(0.6 / 5)
    assert astuple(found) == pytest.approx((1.6, 1.6 - half, 1.6 + half, 4), rel=1e-7)
    assert astuple(Slope.of([7.0] * 50)) == (0.0, 0.0, 0.0, 50)
    with pytest.raises(AssertionError):
        Slope.of([1.0, 2.0])


@given(st.floats(-5, 5), st.floats(-100, 100), st.integers(3, 60), st.integers(3, 12), st.floats(0.01, 100))
def test_slope_of_a_line_is_the_lines(slope: float, level: float, n: int, blocks: int, scale: float) -> None:
    """Whatever the blocks; and values in another unit have a slope in that unit."""
    line = [level + slope * x for x in range(n)]
    found = Slope.of(line, blocks)
    assert astuple(found)[:3] == pytest.approx((slope, slope, slope), abs=1e-6)
    bent = [y + (x % 7) ** 2 for x, y in enumerate(line)]
    one, other = Slope.of(bent, blocks), Slope.of([scale * y + 3 for y in bent], blocks)
    assert astuple(other)[:3] == pytest.approx([scale * v for v in astuple(one)[:3]], rel=1e-6, abs=1e-6 * scale)


def test_slopes_interval_covers_the_truth_though_neighbours_depend_on_each_other() -> None:
    """Autoregressive noise (0.5 from one value to the next) about a line, 300 times: 95 % within four standard errors.

    Over single values the interval would cover 74 %.
    """
    draws = np.random.default_rng(0).normal(size=(300, 200))
    for step in range(1, 200):
        draws[:, step] += 0.5 * draws[:, step - 1]
    found = [Slope.of(0.01 * np.arange(200) + noise) for noise in draws]
    covered = np.mean([s.low <= 0.01 <= s.high for s in found])
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300) <= covered
