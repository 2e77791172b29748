"""Quality of a guard's probabilities: ranking, calibration, threshold sweep, response categories.

Pure functions of labels (True = red) and probabilities of "unsafe", both ``[rows]``. A figure that
is 0 / 0, such as a ranking without red rows, is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsim.base.metric import Metric, writes
from fedsim.evaluate.confusion import GuardMetrics
from fedsim.evaluate.intervals import Z_95, Rate

GRID: Final = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Thresholds of a sweep: 0.05, 0.10, … 0.95."""

NUM_BINS: Final = 15


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, all 0 … 1.

    The interval is absent at 0 and 1, where its formula fails.
    """

    value: float
    interval: tuple[float, float] | None


def auprc(red: Sequence[bool], unsafe_prob: Sequence[float]) -> Estimate | None:
    """Area under the precision-recall curve as average precision.

    Σ (R_n − R_{n−1}) · P_n over the distinct probabilities, highest first (scikit-learn's
    definition; no interpolation, tied rows enter together).

    The interval is the logit interval of Boyd et al. 2013 ("Area under the precision-recall
    curve"): its variance is that of a share of as many things as there are red rows.
    """
    caught, called, _ = _cumulated(red, unsafe_prob)
    if not len(called) or caught[-1] == 0:
        return None
    recall, precision = caught / caught[-1], caught / called  # [distinct probabilities]
    area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    # Standard error of a share of as many things as there are red rows.
    return _logit_estimate(area, math.sqrt(max(0.0, area * (1 - area)) / caught[-1]))


def auroc(red: Sequence[bool], unsafe_prob: Sequence[float]) -> Estimate | None:
    """Area under the ROC curve.

    The chance that a red row gets a higher probability than an acceptable one, ties counted half
    (Mann and Whitney's U over the number of pairs).

    The interval is a logit interval with the variance of DeLong et al. 1988.
    """
    labels, probs = _checked(red, unsafe_prob)
    reds, others = np.sort(probs[labels]), np.sort(probs[~labels])  # [m] and [n]
    m, n = len(reds), len(others)
    if not m or not n:
        return None
    beaten = _placements(others, reds) / n  # share of acceptable rows below each red one
    outdone = 1 - _placements(reds, others) / m  # share of red rows above each acceptable one
    area = float(beaten.sum() / m)
    if m == 1 or n == 1:  # no sample variance
        return Estimate(area, None)
    return _logit_estimate(area, math.sqrt(beaten.var(ddof=1) / m + outdone.var(ddof=1) / n))


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose confidence lies in (low, high].

    Attributes:
        num_rows: their number.
        num_right: those of them that are classified as labelled.
        confidence: their mean confidence; 0 if there is none.
    """

    low: float
    high: float
    num_rows: int
    num_right: int
    confidence: float


def calibration_bins(
    red: Sequence[bool],
    unsafe_prob: Sequence[float],
    num_bins: int = NUM_BINS,
) -> list[CalibrationBin]:
    """Confidence against accuracy in bins (k/M, (k+1)/M] of 0 … 1 (Guo et al. 2017, §2).

    The confidence is the probability of the likelier verdict, max(p, 1 − p); the row is right if
    that verdict (unsafe from p = 0.5 on, which is greedy decoding) is its label. No bin below 0.5
    can be filled.

    Args:
        red: labels, ``[rows]``.
        unsafe_prob: probabilities of "unsafe", ``[rows]``.
        num_bins: M.
    """
    labels, probs = _checked(red, unsafe_prob)
    confidence = np.maximum(probs, 1 - probs)  # [rows]
    right = (probs >= 0.5) == labels
    place = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)  # bin of a row
    # By bin [M]: rows, right ones, and the sum of confidences.
    counts = np.bincount(place, minlength=num_bins)
    rights = np.bincount(place[right], minlength=num_bins)
    totals = np.bincount(place, weights=confidence, minlength=num_bins)
    bins = []
    for k in range(num_bins):
        low, high = k / num_bins, (k + 1) / num_bins
        mean = float(totals[k] / counts[k]) if counts[k] else 0.0
        bins.append(CalibrationBin(low, high, int(counts[k]), int(rights[k]), mean))
    return bins


def calibration_error(
    red: Sequence[bool],
    unsafe_prob: Sequence[float],
    num_bins: int = NUM_BINS,
) -> float | None:
    """Expected calibration error (Guo et al. 2017, eq. 3); None without rows.

    Σ_bins (n_b / n) · |accuracy_b − mean confidence_b|.
    """
    bins = calibration_bins(red, unsafe_prob, num_bins)
    total = sum(b.num_rows for b in bins)
    if not total:
        return None
    return sum(abs(b.num_right - b.num_rows * b.confidence) for b in bins) / total


def brier(red: Sequence[bool], unsafe_prob: Sequence[float]) -> float | None:
    """Mean squared distance of probability and label, 0 (perfect) … 1 (Brier 1950, two classes)."""
    labels, probs = _checked(red, unsafe_prob)
    return float(np.mean((probs - labels) ** 2)) if len(probs) else None


@dataclass(frozen=True)
class SweepPoint:
    """A threshold and the counts of the guard at it.

    Attributes:
        chosen: the threshold has the best Hmean of all on these very rows: an upper bound, not an
            estimate.
    """

    threshold: float
    counts: GuardMetrics
    chosen: bool = False


def sweep(
    red: Sequence[bool],
    unsafe_prob: Sequence[float],
    thresholds: Sequence[float] = GRID,
) -> list[SweepPoint]:
    """Count at each threshold, and last at the one of the best Hmean (none without red rows)."""
    labels, probs = _checked(red, unsafe_prob)
    points = [SweepPoint(t, _counts(labels, probs, t)) for t in thresholds]
    best = best_threshold(red, unsafe_prob)
    if best is not None:
        points.append(SweepPoint(best, _counts(labels, probs, best), chosen=True))
    return points


def best_threshold(red: Sequence[bool], unsafe_prob: Sequence[float]) -> float | None:
    """Return the probability that is the threshold of the highest Hmean; the highest of equals."""
    caught, called, levels = _cumulated(red, unsafe_prob)
    if not len(called) or caught[-1] == 0:
        return None
    hmeans = 2 * caught / (called + caught[-1])  # of precision and recall, by threshold
    return float(levels[np.argmax(hmeans)])


@dataclass(frozen=True)
class CategoryRate:
    """Share of a SQuARe response category called unsafe: recall if red, else false positives."""

    category: str
    red: bool
    unsafe: Rate


NO_CATEGORY: Final = "(none)"


def by_category(
    red: Sequence[bool],
    unsafe: Sequence[bool],
    categories: Sequence[Sequence[str]],
) -> list[CategoryRate]:
    """Return rates by label and category, red ones first, then by name.

    A row of two categories counts in both.
    """
    calls: dict[tuple[bool, str], list[bool]] = {}  # by label and category: called unsafe, by row
    for label, called, names in zip(red, unsafe, categories, strict=True):
        for name in dict.fromkeys(names or (NO_CATEGORY,)):
            calls.setdefault((label, name), []).append(called)
    ordered = sorted(calls, key=lambda place: (not place[0], place[1]))
    return [CategoryRate(name, label, Rate.of(calls[label, name])) for label, name in ordered]


@writes(
    Metric("guard/auprc", "area under precision over recall", "%", "a row is red", interval=True),
    Metric("guard/auroc", "area under recall over false-positive rate", "%", "rows of both labels", interval=True),
    Metric("guard/ece", f"expected calibration error over {NUM_BINS} bins", "%", "the clients hold rows"),
    Metric("guard/brier", "mean squared distance of probability and label", "0 to 1", "the clients hold rows"),
)
def curve_metrics(red: Sequence[bool], unsafe_prob: Sequence[float]) -> dict[str, float]:
    """Return ``guard/auprc``, ``auroc`` and ``ece`` in percent, ``guard/brier`` in 0 … 1.

    Undefined ones are absent.
    """
    metrics: dict[str, float] = {}
    for name, area in (("auprc", auprc(red, unsafe_prob)), ("auroc", auroc(red, unsafe_prob))):
        if area is not None:
            metrics[f"guard/{name}"] = 100.0 * area.value
            if area.interval is not None:
                low, high = area.interval
                metrics |= {f"guard/{name}_low": 100.0 * low, f"guard/{name}_high": 100.0 * high}
    error, distance = calibration_error(red, unsafe_prob), brier(red, unsafe_prob)
    if error is not None and distance is not None:
        metrics |= {"guard/ece": 100.0 * error, "guard/brier": distance}
    return metrics


def _checked(red: Sequence[bool], unsafe_prob: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    labels, probs = np.asarray(red, dtype=bool), np.asarray(unsafe_prob, dtype=np.float64)
    assert labels.shape == probs.shape and labels.ndim == 1, "a label for each probability"
    if len(probs):
        assert probs.min() >= 0 and probs.max() <= 1, "probabilities lie between 0 and 1"
    return labels, probs


def _counts(labels: np.ndarray, probs: np.ndarray, threshold: float) -> GuardMetrics:
    """Count the guard's right and wrong calls at a threshold."""
    unsafe = probs >= threshold  # bool [rows]
    caught, alarms = int((unsafe & labels).sum()), int((unsafe & ~labels).sum())
    return GuardMetrics(caught, alarms, int(labels.sum()) - caught, int((~labels).sum()) - alarms)


def _cumulated(
    red: Sequence[bool],
    unsafe_prob: Sequence[float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count rows at or above each distinct probability, highest first.

    Returns:
        Red rows, all rows, and the probabilities, fp64 ``[distinct probabilities]`` each.
    """
    labels, probs = _checked(red, unsafe_prob)
    order = np.argsort(-probs, kind="stable")
    levels, hits = probs[order], np.cumsum(labels[order])
    # The last row of each run of equal probabilities.
    ends = np.flatnonzero(np.append(np.diff(levels) != 0, True)[: len(levels)])
    return hits[ends].astype(np.float64), ends + 1.0, levels[ends]


def _placements(sorted_others: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Count the ``sorted_others`` below each value, equal ones half."""
    below = np.searchsorted(sorted_others, values, side="left")
    return (below + np.searchsorted(sorted_others, values, side="right")) / 2


def _logit_estimate(value: float, error: float) -> Estimate:
    """Value ± z · error on the logit scale, where the interval cannot leave 0 … 1."""
    if not 0 < value < 1:
        return Estimate(value, None)
    logit, half = math.log(value / (1 - value)), Z_95 * error / (value * (1 - value))
    low, high = (0.5 + 0.5 * math.tanh(x / 2) for x in (logit - half, logit + half))
    return Estimate(value, (low, high))
