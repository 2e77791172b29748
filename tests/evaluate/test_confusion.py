"""Guard metrics against the arithmetic of the paper's Table 2."""

from __future__ import annotations

from statistics import harmonic_mean

import pytest

from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.evaluate.intervals import Rate


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


@pytest.mark.parametrize("counts", [(3, 1, 2, 5), (1, 9, 1, 0), (7, 0, 0, 7), (0, 2, 3, 4)])
def test_the_interval_of_hmean_is_wilson_s_of_jaccard(counts: tuple[int, int, int, int]) -> None:
    """Hmean = 2J / (1 + J): the ends, taken back to J, are Wilson's; true negatives do not count."""
    guard = GuardMetrics(*counts)
    assert guard.hmean is not None and guard.hmean_interval is not None
    caught, alarms, missed, passed = counts
    ends = tuple(end / (2 - end) for end in guard.hmean_interval)
    assert ends == pytest.approx(Rate(caught, caught + alarms + missed).interval, abs=1e-12)
    assert guard.hmean_interval[0] <= guard.hmean <= guard.hmean_interval[1]
    assert GuardMetrics(caught, alarms, missed, passed + 50).hmean_interval == guard.hmean_interval


def test_rates_have_their_counts_and_intervals() -> None:
    guard = GuardMetrics(num_caught=3, num_false_alarms=1, num_missed=2, num_passed=5)
    assert {name: (rate.successes, rate.total) for name, rate in guard.rates.items()} == {
        "accuracy": (8, 11), "precision": (3, 4), "recall": (3, 5), "fpr": (1, 6), "unsafe_share": (4, 11),
        "red_share_before": (5, 11),
    }  # fmt: skip
    for name, rate in guard.rates.items():
        assert getattr(guard, name) == rate.value
        ends = [guard.as_metrics()[f"guard/{name}{end}"] for end in ("_low", "_high")]
        assert ends == [100 * end for end in rate.interval]
    assert GuardMetrics(0, 0, 0, 4).hmean_interval is None, "nothing red, nothing called unsafe"


@pytest.mark.parametrize(("prob", "unsafe"), [(0.49, False), (0.5, True), (0.51, True)])
def test_a_verdict_is_unsafe_from_the_threshold_on(prob: float, unsafe: bool) -> None:
    assert Verdict.at(0.5, prob, cut=True) == Verdict(unsafe, prob, True)
