"""Ranking, calibration and sweep against hand-computed cases, O(n²) definitions, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.safety.guard_curves import (
    GRID,
    CategoryRate,
    auprc,
    auroc,
    best_threshold,
    brier,
    by_category,
    calibration_bins,
    calibration_error,
    curve_metrics,
    sweep,
)

# Few distinct values, so that ties between labels are common; sixteenths add and flip without rounding.
LEVELS = st.sampled_from([i / 16 for i in range(17)])
ROWS = st.lists(st.tuples(st.booleans(), LEVELS), min_size=1, max_size=25)
BOTH = ROWS.filter(lambda rows: len({red for red, _ in rows}) == 2)
Rows = list[tuple[bool, float]]


def columns(rows: Rows) -> tuple[list[bool], list[float]]:
    return [red for red, _ in rows], [prob for _, prob in rows]


def value(estimate: object) -> float:
    assert estimate is not None
    return estimate.value  # type: ignore[attr-defined,no-any-return]


def slow_auprc(rows: Rows) -> float:
    """Precision at each threshold times the recall that it adds, counted anew at every threshold."""
    total, area, before = sum(red for red, _ in rows), 0.0, 0.0
    for level in sorted({prob for _, prob in rows}, reverse=True):
        called = [red for red, prob in rows if prob >= level]
        recall = sum(called) / total
        area += (recall - before) * sum(called) / len(called)
        before = recall
    return area


def slow_auroc(rows: Rows) -> float:
    pairs = [(p > q) + 0.5 * (p == q) for red, p in rows if red for other, q in rows if not other]
    return sum(pairs) / len(pairs)


@settings(max_examples=300, deadline=None)
@given(BOTH)
def test_areas_are_those_of_their_definitions(rows: Rows) -> None:
    assert value(auprc(*columns(rows))) == pytest.approx(slow_auprc(rows), abs=1e-12)
    assert value(auroc(*columns(rows))) == pytest.approx(slow_auroc(rows), abs=1e-12)


def test_areas_by_hand() -> None:
    """scikit-learn's own example: labels 0 0 1 1, scores 0.1 0.4 0.35 0.8 → average precision 0.8333, AUROC 0.75."""
    red, probs = [False, False, True, True], [0.1, 0.4, 0.35, 0.8]
    assert value(auprc(red, probs)) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert value(auroc(red, probs)) == 0.75
    assert value(auprc([True, False], [0.5, 0.5])) == 0.5, "tied rows enter together, in whatever order they stand"


@settings(max_examples=150, deadline=None)
@given(BOTH)
def test_areas_depend_on_the_order_alone(rows: Rows) -> None:
    red, probs = columns(rows)
    squeezed = [0.25 + p**3 / 2 for p in probs]
    for area in (auprc, auroc):
        assert area(red, squeezed) == area(red, probs)
        assert area(red[::-1], probs[::-1]) == area(red, probs)


@settings(max_examples=150, deadline=None)
@given(BOTH)
def test_flipping_labels_or_probabilities_mirrors_the_ranking(rows: Rows) -> None:
    red, probs = columns(rows)
    other, rest = [not label for label in red], [1 - p for p in probs]
    assert value(auroc(other, probs)) == pytest.approx(1 - value(auroc(red, probs)), abs=1e-12)
    assert value(auroc(other, rest)) == pytest.approx(value(auroc(red, probs)), abs=1e-12)
    assert brier(other, rest) == pytest.approx(brier(red, probs), abs=1e-12)
    assume(0.5 not in probs)  # the likelier verdict is "unsafe" there
    assert calibration_error(other, rest) == pytest.approx(calibration_error(red, probs), abs=1e-12)


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_a_guard_that_cannot_tell_rows_apart(prob: float) -> None:
    red = [True] * 3 + [False] * 7
    assert value(auroc(red, [prob] * 10)) == 0.5
    assert value(auprc(red, [prob] * 10)) == pytest.approx(0.3), "the prevalence"


def test_a_perfect_ranking_and_its_opposite() -> None:
    red = [True, True, False, False, False]
    assert value(auroc(red, [0.9, 0.8, 0.3, 0.2, 0.1])) == value(auprc(red, [0.9, 0.8, 0.3, 0.2, 0.1])) == 1
    assert value(auroc(red, [0.1, 0.2, 0.3, 0.8, 0.9])) == 0
    estimate = auroc(red, [0.9, 0.8, 0.3, 0.2, 0.1])
    assert estimate is not None and estimate.interval is None, "the formula has no width to give there"


def slow_delong(rows: Rows) -> float:
    """Standard error by the structural components of DeLong et al. 1988."""
    red, other = [p for label, p in rows if label], [p for label, p in rows if not label]
    score = [[(p > q) + 0.5 * (p == q) for q in other] for p in red]
    tens = np.array(score).mean(axis=1)
    ones = np.array(score).mean(axis=0)
    return float(math.sqrt(tens.var(ddof=1) / len(red) + ones.var(ddof=1) / len(other)))


@settings(max_examples=100, deadline=None)
@given(BOTH.filter(lambda rows: 1 < sum(red for red, _ in rows) < len(rows) - 1))
def test_intervals_lie_on_the_logit_scale(rows: Rows) -> None:
    for estimate, error in (
        (auroc(*columns(rows)), slow_delong(rows)),
        (auprc(*columns(rows)), math.sqrt(slow_auprc(rows) * (1 - min(1.0, slow_auprc(rows))) / sum(columns(rows)[0]))),
    ):
        assert estimate is not None
        if not 1e-9 < estimate.value < 1 - 1e-9:
            continue
        assert estimate.interval is not None
        low, high = (math.log(x / (1 - x)) if 0 < x < 1 else None for x in estimate.interval)
        middle, slope = math.log(estimate.value / (1 - estimate.value)), estimate.value * (1 - estimate.value)
        if low is not None and high is not None and error < 0.4:
            assert (low + high) / 2 == pytest.approx(middle, abs=1e-6)
            assert (high - low) / 2 == pytest.approx(1.959964 * error / slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("auroc_wanted", [0.7, 0.9])
def test_intervals_cover_the_truth(auroc_wanted: float) -> None:
    """Two normal distributions: AUROC = Φ(shift / √2). Of 200 samples about 190 intervals must hold it."""
    rng = np.random.default_rng(1)
    shift = {0.7: 0.74161, 0.9: 1.81239}[auroc_wanted]
    red = [True] * 60 + [False] * 140
    held = 0
    for _ in range(200):
        scores = np.concatenate([rng.normal(shift, 1, 60), rng.normal(0, 1, 140)])
        estimate = auroc(red, 1 / (1 + np.exp(-scores)))
        assert estimate is not None and estimate.interval is not None
        held += estimate.interval[0] <= auroc_wanted <= estimate.interval[1]
    assert 180 <= held <= 198


def test_calibration_by_hand() -> None:
    """Confidences 0.9 (right, right, wrong) and 0.6 (wrong): 3/4 · |2/3 − 0.9| + 1/4 · |0 − 0.6|."""
    red, probs = [True, False, False, True], [0.9, 0.1, 0.9, 0.4]
    assert calibration_error(red, probs) == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6)
    assert brier(red, probs) == pytest.approx((0.01 + 0.01 + 0.81 + 0.36) / 4)
    bins = calibration_bins(red, probs)
    assert len(bins) == 15 and (bins[13].num_rows, bins[13].num_right) == (3, 2)
    assert (bins[13].low, bins[13].high) == (13 / 15, 14 / 15) and bins[13].confidence == pytest.approx(0.9)
    assert (bins[8].num_rows, bins[8].num_right) == (1, 0), "0.6 = 9/15 closes the ninth bin"
    assert sum(b.num_rows for b in bins) == 4 and all(b.num_rows == 0 for b in bins[:7])


def slow_error(rows: Rows, num_bins: int) -> float:
    total = 0.0
    for k in range(num_bins):
        inside = [(red, p) for red, p in rows if k / num_bins < max(p, 1 - p) <= (k + 1) / num_bins]
        if inside:
            right = sum((p >= 0.5) == red for red, p in inside) / len(inside)
            total += len(inside) / len(rows) * abs(right - sum(max(p, 1 - p) for _, p in inside) / len(inside))
    return total


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([1, 4, 15]))
def test_calibration_error_is_its_definition(rows: Rows, num_bins: int) -> None:
    assert calibration_error(*columns(rows), num_bins) == pytest.approx(slow_error(rows, num_bins), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_hard_verdicts_are_off_by_their_error_rate(rows: Rows) -> None:
    """A guard that is always certain, such as an oracle: ECE and Brier score are both its share of errors."""
    red, probs = columns([(label, float(p >= 0.5)) for label, p in rows])
    wrong = sum(label != (p == 1) for label, p in zip(red, probs, strict=True)) / len(red)
    assert calibration_error(red, probs) == pytest.approx(wrong, abs=1e-12)
    assert brier(red, probs) == pytest.approx(wrong, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_a_sweep_counts_as_verdicts_at_each_threshold_do(rows: Rows) -> None:
    red, probs = columns(rows)
    points = sweep(red, probs)
    assert [point.threshold for point in points[: len(GRID)]] == list(GRID)
    for point in points:
        verdicts = [Verdict.at(point.threshold, p) for p in probs]
        assert point.counts == GuardMetrics.of(red, verdicts)
    assert [point.chosen for point in points[: len(GRID)]] == [False] * len(GRID)
    if not any(red):
        assert len(points) == len(GRID)
        return
    (best,) = points[len(GRID) :]
    reachable = {p: GuardMetrics.of(red, [Verdict.at(p, q) for q in probs]).hmean or 0.0 for p in set(probs)}
    assert best.chosen and best.counts.hmean == max(reachable.values())
    assert best.threshold == max(p for p, hmean in reachable.items() if hmean == best.counts.hmean)


def test_the_grid() -> None:
    assert GRID[0] == 0.05 and GRID[-1] == 0.95 and 0.5 in GRID and len(GRID) == 19


def test_categories_count_a_row_of_two_in_both() -> None:
    red = [True, True, True, False, False]
    unsafe = [True, False, True, True, False]
    tags = [("unethical", "predictive"), ("unethical",), (), ("etc", "objective"), ("objective", "objective")]
    found = {(r.red, r.category): (r.unsafe.successes, r.unsafe.total) for r in by_category(red, unsafe, tags)}
    assert found == {
        (True, "unethical"): (1, 2),
        (True, "predictive"): (1, 1),
        (True, "(none)"): (1, 1),
        (False, "etc"): (1, 1),
        (False, "objective"): (1, 2),
    }
    order = [(r.red, r.category) for r in by_category(red, unsafe, tags)]
    assert order == sorted(order, key=lambda place: (not place[0], place[1])), "red ones first, then by name"
    assert isinstance(by_category(red, unsafe, tags)[0], CategoryRate)


def test_metrics_are_in_percent_and_undefined_ones_are_absent() -> None:
    metrics = curve_metrics([False, False, True, True], [0.1, 0.4, 0.35, 0.8])
    assert metrics["guard/auroc"] == 75.0 and metrics["guard/auprc"] == pytest.approx(83.333, abs=0.001)
    assert 0 < metrics["guard/auroc_low"] < 75 < metrics["guard/auroc_high"] < 100
    assert metrics["guard/brier"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04) / 4)
    assert metrics["guard/ece"] > 1
    alone = curve_metrics([True, True], [0.5, 0.25])
    assert set(alone) == {"guard/auprc", "guard/ece", "guard/brier"}, "no acceptable row: nothing to rank against"
    assert set(curve_metrics([False], [0.25])) == {"guard/ece", "guard/brier"}
    assert curve_metrics([], []) == {} and best_threshold([], []) is None and sweep([], [])[0].counts.num_rows == 0
