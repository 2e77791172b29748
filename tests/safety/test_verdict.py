"""Guard metrics against the arithmetic of the paper's Table 2."""

from __future__ import annotations

from statistics import harmonic_mean

import pytest

from fedsim.safety.verdict import GuardMetrics, Verdict


def at_operating_point(num_rows: int, prevalence: float, precision: float, recall: float) -> GuardMetrics:
    """Counts, rounded to whole rows, of a guard with these rates."""
    red = round(num_rows * prevalence)
    caught = round(red * recall)
    alarms = round(caught / precision) - caught
    return GuardMetrics(caught, alarms, red - caught, num_rows - red - alarms)


def test_table_2_of_the_paper() -> None:
    guard = at_operating_point(20_000, 0.30, 0.567, 0.737)
    shown = guard.as_metrics()
    assert shown["guard/precision"] == pytest.approx(56.7, abs=0.05)
    assert shown["guard/recall"] == pytest.approx(73.7, abs=0.05)
    assert shown["guard/hmean"] == pytest.approx(64.1, abs=0.05)
    assert shown["guard/accuracy"] == pytest.approx(75.2, abs=0.05)
    assert shown["guard/red_share_before"] == pytest.approx(30.0)
    assert guard.red_share_after == pytest.approx(0.129, abs=0.001)
    assert shown["guard/unsafe_share"] == pytest.approx(39.0, abs=0.1)
    assert shown["guard/num_rows"] == 20_000
    assert shown["guard/fpr"] == pytest.approx(24.1, abs=0.1)


def test_untuned_llama_guard_of_table_2() -> None:
    guard = at_operating_point(20_000, 0.30, 0.906, 0.005)
    assert guard.accuracy == pytest.approx(0.701, abs=0.001)
    assert guard.hmean == pytest.approx(0.010, abs=0.0005)


def test_counts_from_labels_and_verdicts() -> None:
    red = [True, True, True, False, False]
    verdicts = [Verdict(u, p, c) for u, p, c in [(1, 0.9, 0), (1, 0.6, 1), (0, 0.4, 0), (1, 0.7, 0), (0, 0.1, 1)]]
    guard = GuardMetrics.of(red, verdicts)
    assert guard == GuardMetrics(num_caught=2, num_false_alarms=1, num_missed=1, num_passed=1, num_cut=2)
    assert (guard.num_rows, guard.num_red, guard.num_unsafe) == (5, 3, 3)
    assert guard.accuracy == 3 / 5 and guard.precision == guard.recall == 2 / 3
    assert guard.fpr == 1 / 2 and guard.red_share_after == 1 / 2


@pytest.mark.parametrize("counts", [(3, 1, 2, 5), (1, 9, 1, 0), (7, 0, 0, 7)])
def test_hmean_is_the_harmonic_mean(counts: tuple[int, int, int, int]) -> None:
    guard = GuardMetrics(*counts)
    assert guard.precision is not None and guard.recall is not None
    assert guard.hmean == pytest.approx(harmonic_mean([guard.precision, guard.recall]))


def test_undefined_rates_are_absent_not_invented() -> None:
    silent = GuardMetrics(0, 0, 2, 3)  # called nothing unsafe
    assert silent.precision is None and silent.recall == 0 and silent.hmean == 0
    assert "guard/precision" not in silent.as_metrics() and silent.as_metrics()["guard/hmean"] == 0
    strict = GuardMetrics(2, 3, 0, 0)  # called everything unsafe
    assert strict.red_share_after is None and strict.unsafe_share == 1
    assert GuardMetrics.of([], []).accuracy is None


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError):
        GuardMetrics.of([True], [])
