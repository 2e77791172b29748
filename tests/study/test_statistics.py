"""Means and differences over seeds and items: closed forms, symmetries, and coverage where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsim.base.errors import DataError
from fedsim.study.statistics import detectable, difference, estimate, shown_detectable, t_quantile, verdict

TABLES = st.tuples(st.integers(1, 5), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(*(arrays(np.float64, shape, elements=st.integers(-8, 8)) for _ in range(2)))
)


@pytest.mark.parametrize(
    ("p", "df", "known"),  # printed tables of Student's t
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.8, 2, 1.06066), (0.975, 4, 2.77645), (0.975, 30, 2.04227)],
)
def test_quantiles_are_those_of_printed_tables(p: float, df: float, known: float) -> None:
    assert t_quantile(p, df) == pytest.approx(known, rel=2e-5)


@pytest.mark.parametrize(
    ("p", "df", "known"),  # by inverting the incomplete beta function to 20 digits
    [(0.975, 1.1, 10.2768013), (0.975, 1.5, 6.0166631), (0.8, 1.1, 1.31000816), (0.975, 7.3, 2.34506674)],
)
def test_quantiles_of_broken_degrees_of_freedom(p: float, df: float, known: float) -> None:
    """The worst df below 2 is off by 1.4e-4; what the docstring says."""
    assert t_quantile(p, df) == pytest.approx(known, rel=2e-4)
    assert t_quantile(1 - p, df) == pytest.approx(-known, rel=2e-4)


def test_quantiles_tend_to_the_normal() -> None:
    assert t_quantile(0.975, 1e9) == pytest.approx(1.959964, rel=1e-5)


@given(TABLES)
def test_swapping_the_arms_mirrors_the_difference(arms: tuple[np.ndarray, np.ndarray]) -> None:
    there, back = difference(*arms), difference(*arms[::-1])
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)


@given(TABLES, st.randoms(use_true_random=False))
def test_the_order_of_seeds_and_items_does_not_matter(arms: tuple[np.ndarray, np.ndarray], draw) -> None:
    seeds, items = (draw.sample(range(n), n) for n in arms[0].shape)
    shuffled = [arm[seeds][:, items] for arm in arms]
    plain, other = difference(*arms), difference(*shuffled)
    assert (plain.mean, plain.low, plain.high) == pytest.approx((other.mean, other.low, other.high), abs=1e-9)


@given(TABLES, st.integers(2, 9))
def test_the_unit_does_not_matter(arms: tuple[np.ndarray, np.ndarray], factor: int) -> None:
    plain, scaled = difference(*arms), difference(*(factor * arm for arm in arms))
    expected = tuple(factor * v for v in (plain.mean, plain.low, plain.high))
    assert (scaled.mean, scaled.low, scaled.high) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(TABLES)
def test_an_arm_does_not_differ_from_itself(arms: tuple[np.ndarray, np.ndarray]) -> None:
    found = difference(arms[0], arms[0])
    assert found.mean == found.sign == 0
    if arms[0].shape[1] > 1:
        assert (found.low, found.high) == (0, 0)
    assert verdict(found, 1) == verdict(found, -1) == "cannot tell"
    assert detectable(arms[0], arms[0]) is None


def test_one_seed_gives_the_textbook_interval_over_items() -> None:
    values = np.array([[1.0, 2.0, 4.0, 9.0, 4.0]])
    error = values.std(ddof=1) / np.sqrt(5)
    found = estimate(values)
    assert (found.low, found.high) == pytest.approx((4 - 2.776445 * error, 4 + 2.776445 * error), rel=1e-5)


def test_without_item_effects_it_is_the_paired_t_interval_over_seeds() -> None:
    per_seed = np.array([3.0, 4.0, 8.0])
    found = difference(np.repeat(per_seed[:, None], 50, axis=1), np.zeros((3, 50)))
    error = per_seed.std(ddof=1) / np.sqrt(3)
    assert (found.mean, found.high) == pytest.approx((5.0, 5 + 4.302653 * error), rel=1e-5)


def test_resampling_seeds_and_items_has_the_same_variance_where_there_are_many() -> None:
    """The pigeonhole bootstrap itself, as the oracle, on a table whose interaction is small beside both effects."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(60, 1)) + rng.normal(size=(1, 80)) + 0.1 * rng.normal(size=(60, 80))
    seeds, items = rng.integers(60, size=(4000, 60)), rng.integers(80, size=(4000, 80))
    means = [table[np.ix_(s, i)].mean() for s, i in zip(seeds, items, strict=True)]
    found = estimate(table)
    assert (found.high - found.low) / 2 == pytest.approx(1.98 * np.std(means), rel=0.06)


@pytest.mark.parametrize(("num_seeds", "sd_seed", "sd_item"), [(3, 1, 2), (3, 0.1, 2), (5, 1, 1), (5, 0, 3)])
def test_intervals_cover_the_truth_as_often_as_they_say(num_seeds: int, sd_seed: float, sd_item: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        table = sd_seed * rng.normal(size=(num_seeds, 1)) + sd_item * rng.normal(size=(1, 60))
        found = estimate(7 + table + 3 * rng.normal(size=(num_seeds, 60)))
        covered += found.low <= 7 <= found.high
    assert 0.93 < covered / 600 < 0.985


def test_a_detectable_difference_is_seen_four_times_in_five() -> None:
    rng = np.random.default_rng(2)

    def draw(shift: float) -> np.ndarray:
        return shift + rng.normal(size=(6, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(6, 40))

    smallest = np.median([detectable(draw(0), np.zeros((6, 40))) for _ in range(150)])
    seen = [difference(draw(smallest), np.zeros((6, 40))).sign == 1 for _ in range(1000)]
    assert 0.72 < np.mean(seen) < 0.88


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_a_single_score_says_nothing_of_how_far_it_varies(num_seeds: int) -> None:
    found = difference(np.full((num_seeds, 1), 7.5), np.full((num_seeds, 1), 7.0))
    assert found.sign == 0 and verdict(found, 1) == "cannot tell" and found.shown(2, "+") == "+0.50 (one outcome)"
    assert difference(np.array([[7.5], [7.6]]), np.array([[7.0], [7.0]])).low > -np.inf


def test_a_rate_at_its_end_gets_wilsons_interval() -> None:
    found = estimate(np.full((3, 520), 100.0), (0.0, 100.0))
    assert found.high == 100 and found.low == pytest.approx(100 * 520 / (520 + 1.959964**2), rel=1e-6)
    assert estimate(np.zeros((3, 520)), (0.0, 100.0)).high == pytest.approx(100 - found.low)


def test_a_rate_near_its_end_reaches_as_far_as_wilsons() -> None:
    """One miss in one of three seeds: the spread alone says ± 0.4 points of 520 items, a third of a miss ± 0.7."""
    table = np.full((3, 520), 100.0)
    table[1, 7] = 0.0
    found, share = estimate(table, (0.0, 100.0)), 1 - 1 / 1560
    zz, n = 1.959964**2, 520
    centre, half = share + zz / (2 * n), 1.959964 * np.sqrt(share * (1 - share) / n + zz / (4 * n * n))
    assert found.low == pytest.approx(100 * (centre - half) / (1 + zz / n), rel=1e-6)
    assert estimate(table, (1.0, 100.0)).low > found.low, "points are no rate"


def test_intervals_stay_on_the_scale() -> None:
    found = estimate(np.array([[100.0, 0.0], [100.0, 100.0]]), (0.0, 100.0))
    assert 0 <= found.low <= found.mean <= found.high <= 100


@pytest.mark.parametrize(("effect", "word"), [((1.0, 2.0), "reproduced"), ((-2.0, -1.0), "contradicted")])
def test_verdicts(effect: tuple[float, float], word: str) -> None:
    found = difference(np.array([[effect[0]] * 2, [effect[1]] * 2]) * 100, np.array([[0.0, 0.1], [0.1, 0.0]]))
    assert found.sign in (0, np.sign(effect[0]))
    wide = difference(np.full((3, 4), effect[0]) + np.arange(4) / 100, np.zeros((3, 4)))
    assert verdict(wide, 1) == word


@pytest.mark.parametrize("sign", [1, -1])
def test_one_seed_cannot_tell(sign: int) -> None:
    """However narrow its interval over items: how far seeds vary is unknown."""
    items = sign * (50.0 + np.arange(40.0)[None, :] / 100)
    alone = difference(items, np.zeros((1, 40)))
    assert alone.sign == sign and verdict(alone, sign) == verdict(alone, -sign) == "cannot tell"
    twice = difference(np.repeat(items, 2, axis=0), np.zeros((2, 40)))
    assert twice.sign == sign and verdict(twice, sign) == "reproduced" and verdict(twice, -sign) == "contradicted"


@pytest.mark.parametrize("interaction", [1.0, 20.0])
def test_the_interaction_is_counted_once(interaction: float) -> None:
    """The mean squares of seeds and of items both hold it, so that one is taken out, down to each part alone."""
    both = interaction * np.array([[1.0, -2.0, 1.0, 0.0], [0.0, 1.0, -2.0, 1.0], [-1.0, 1.0, 1.0, -1.0]])
    table = np.array([[0.0], [5.0], [13.0]]) + np.array([[0.0, 3.0, 9.0, 16.0]]) + both
    rows, columns = table.mean(axis=1) - table.mean(), table.mean(axis=0) - table.mean()
    rest = table - table.mean() - rows[:, None] - columns[None, :]
    seeds, items, rest_ms = 4 * (rows**2).sum() / 2, 3 * (columns**2).sum() / 3, (rest**2).sum() / 6
    assert (rest_ms < min(seeds, items)) == (interaction == 1.0)
    variance = max(seeds + items - rest_ms, seeds, items)
    df = variance**2 / (seeds**2 / 2 + items**2 / 3 + rest_ms**2 / 6)
    found = estimate(table)
    half = t_quantile(0.975, max(df, 1.0)) * (variance / 12) ** 0.5
    assert found.high - found.mean == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize("bounds", [(0.0, 100.0), (1.0, 10.0)])
def test_differences_stay_on_the_scale(bounds: tuple[float, float]) -> None:
    """Three seeds of [0, 0, 100] against [0, 100, 0]: the interval alone would reach beyond ± 100 points."""
    width = bounds[1] - bounds[0]
    treated = np.repeat(np.array([[0.0], [0.0], [1.0]]) * width, 5, axis=1)
    control = np.repeat(np.array([[0.0], [1.0], [0.0]]) * width, 5, axis=1)
    free, bounded = difference(treated, control), difference(treated, control, bounds)
    assert free.low < -width < width < free.high
    assert (bounded.low, bounded.mean, bounded.high) == (-width, 0.0, width)
    smallest = detectable(treated, control)
    assert smallest is not None and smallest > width
    assert shown_detectable(smallest, 1, bounds) == "more than the scale"
    assert shown_detectable(width / 2, 1, bounds) == f"{width / 2:.1f}" and shown_detectable(None, 1, bounds) == ""


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.array([[np.nan]]), np.array([1.0]), np.array([[np.inf, 1.0]])])
def test_what_is_no_table_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="finite table"):
        estimate(bad)


def test_arms_that_do_not_pair_are_refused() -> None:
    with pytest.raises(DataError, match="do not pair"):
        difference(np.zeros((2, 3)), np.zeros((3, 3)))
