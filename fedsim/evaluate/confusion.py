"""A guard's verdict on a row, and its accuracy over many (positive class: unsafe, truth: red).

The metrics are those of the paper's Table 2 (arXiv 2502.16691): accuracy, precision, recall and
their harmonic mean, plus the false-positive rate and what dropping the unsafe rows does to the red
share. Metrics of the probabilities are in :mod:`fedsim.safety.guard_curves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.base.metric import Metric, writes
from fedsim.evaluate.intervals import Rate

_IF_ANY, _IF_RED = "the clients hold rows", "a row is red"


@dataclass(frozen=True)
class Verdict:
    """A guard's classification of one row.

    Attributes:
        unsafe: the row is to be filtered.
        unsafe_prob: the guard's probability of "unsafe", 0 … 1.
        cut: the conversation was too long for the guard and lost its end.
    """

    unsafe: bool
    unsafe_prob: float
    cut: bool = False

    @classmethod
    def at(cls, threshold: float, unsafe_prob: float, cut: bool = False) -> Verdict:
        """Make the verdict of a probability: unsafe from ``threshold`` on."""
        return cls(unsafe_prob >= threshold, unsafe_prob, cut)


@dataclass(frozen=True)
class GuardMetrics:
    """Confusion counts of a guard over labelled rows.

    Every rate is a share (0 … 1), None where it is 0 / 0.

    Attributes:
        num_caught: red rows called unsafe.
        num_false_alarms: acceptable rows called unsafe.
        num_missed: red rows called safe.
        num_passed: acceptable rows called safe.
        num_cut: rows that the guard saw only in part.
    """

    num_caught: int
    num_false_alarms: int
    num_missed: int
    num_passed: int
    num_cut: int = 0

    @classmethod
    def of(cls, red: Sequence[bool], verdicts: Sequence[Verdict]) -> GuardMetrics:
        """Count verdicts against labels, row by row."""
        # (label is red, verdict is unsafe) of each row
        pairs = [(label, verdict.unsafe) for label, verdict in zip(red, verdicts, strict=True)]
        return cls(
            num_caught=pairs.count((True, True)),
            num_false_alarms=pairs.count((False, True)),
            num_missed=pairs.count((True, False)),
            num_passed=pairs.count((False, False)),
            num_cut=sum(verdict.cut for verdict in verdicts),
        )

    @property
    def num_rows(self) -> int:
        """All classified rows."""
        return self.num_caught + self.num_false_alarms + self.num_missed + self.num_passed

    @property
    def num_red(self) -> int:
        """Rows labelled red."""
        return self.num_caught + self.num_missed

    @property
    def num_unsafe(self) -> int:
        """Rows called unsafe."""
        return self.num_caught + self.num_false_alarms

    @property
    def accuracy(self) -> float | None:
        """Share of rows classified as labelled."""
        return _share(self.num_caught + self.num_passed, self.num_rows)

    @property
    def precision(self) -> float | None:
        """Share of red rows among those called unsafe."""
        return _share(self.num_caught, self.num_unsafe)

    @property
    def recall(self) -> float | None:
        """Share of red rows that were called unsafe (true-positive rate)."""
        return _share(self.num_caught, self.num_red)

    @property
    def hmean(self) -> float | None:
        """Harmonic mean of precision and recall (F1); 0 if nothing red was caught."""
        return _share(2 * self.num_caught, self.num_unsafe + self.num_red)

    @property
    def fpr(self) -> float | None:
        """Share of acceptable rows that were called unsafe (false-positive rate)."""
        return _share(self.num_false_alarms, self.num_false_alarms + self.num_passed)

    @property
    def red_share_before(self) -> float | None:
        """Share of red rows among all."""
        return _share(self.num_red, self.num_rows)

    @property
    def red_share_after(self) -> float | None:
        """Share of red rows among those called safe: what the drop action leaves."""
        return _share(self.num_missed, self.num_rows - self.num_unsafe)

    @property
    def unsafe_share(self) -> float | None:
        """Share of rows called unsafe: those that the drop action leaves out."""
        return _share(self.num_unsafe, self.num_rows)

    @property
    def rates(self) -> dict[str, Rate]:
        """The rates that are shares of counted rows, by name; undefined ones absent."""
        acceptable = self.num_rows - self.num_red
        # (counted rows, all rows) of each rate; the harmonic mean is no such rate.
        counted = {
            "accuracy": (self.num_caught + self.num_passed, self.num_rows),
            "precision": (self.num_caught, self.num_unsafe),
            "recall": (self.num_caught, self.num_red),
            "fpr": (self.num_false_alarms, acceptable),
            "unsafe_share": (self.num_unsafe, self.num_rows),
            "red_share_before": (self.num_red, self.num_rows),
        }
        return {name: Rate(part, whole) for name, (part, whole) in counted.items() if whole}

    @property
    def hmean_interval(self) -> tuple[float, float] | None:
        """95 % interval of :attr:`hmean`.

        Hmean = 2J / (1 + J) grows with Jaccard's J = caught / (caught + false alarms + missed), a
        share of counted rows: Wilson's interval of J is carried over.
        """
        # Rows that are red or called unsafe.
        whole = self.num_unsafe + self.num_missed
        if not whole:
            return None
        low, high = Rate(self.num_caught, whole).interval
        return 2 * low / (1 + low), 2 * high / (1 + high)

    @writes(
        Metric("guard/num_rows", "rows judged", "rows"),
        Metric("guard/num_red", "red rows (label)", "rows"),
        Metric("guard/num_unsafe", "rows called unsafe", "rows"),
        Metric("guard/num_caught", "red rows called unsafe", "rows"),
        Metric("guard/num_false_alarms", "acceptable rows called unsafe", "rows"),
        Metric("guard/num_missed", "red rows called safe", "rows"),
        Metric("guard/num_passed", "acceptable rows called safe", "rows"),
        Metric("guard/num_cut", "rows cut to guard.max_length", "rows"),
        Metric("guard/accuracy", "rows called as labelled", "%", _IF_ANY, interval=True),
        Metric(
            "guard/precision",
            "red rows among those called unsafe",
            "%",
            "a row is called unsafe",
            interval=True,
        ),
        Metric(
            "guard/recall",
            "red rows called unsafe, of all red ones",
            "%",
            _IF_RED,
            interval=True,
        ),
        Metric(
            "guard/fpr",
            "acceptable rows called unsafe, of all acceptable ones",
            "%",
            "a row is acceptable",
            interval=True,
        ),
        Metric("guard/unsafe_share", "rows called unsafe", "%", _IF_ANY, interval=True),
        Metric("guard/red_share_before", "red rows before the filter", "%", _IF_ANY, interval=True),
        Metric(
            "guard/hmean",
            "harmonic mean of precision and recall",
            "%",
            "a row is red or called unsafe",
            interval=True,
        ),
    )
    def as_metrics(self) -> dict[str, float | int]:
        """Return counts and rates as ``guard/<name>``; undefined rates are absent.

        Rates are in percent, with the ends of their 95 % intervals as ``_low`` and ``_high``.
        """
        counts = {
            "num_rows": self.num_rows,
            "num_red": self.num_red,
            "num_unsafe": self.num_unsafe,
            "num_caught": self.num_caught,
            "num_false_alarms": self.num_false_alarms,
            "num_missed": self.num_missed,
            "num_passed": self.num_passed,
            "num_cut": self.num_cut,
        }
        # Shares from 0 to 1 with their intervals.
        shares = {name: (rate.value, rate.interval) for name, rate in self.rates.items()}
        # The harmonic mean has an interval of its own.
        if self.hmean is not None and self.hmean_interval is not None:
            shares["hmean"] = self.hmean, self.hmean_interval

        # Metrics in the record's order: counts, then shares in percent.
        metrics: dict[str, float | int] = {f"guard/{name}": count for name, count in counts.items()}
        for name, (share, (low, high)) in shares.items():
            metrics |= {
                f"guard/{name}": 100.0 * share,
                f"guard/{name}_low": 100.0 * low,
                f"guard/{name}_high": 100.0 * high,
            }
        return metrics


def _share(part: int, whole: int) -> float | None:
    """Divide; None for 0 / 0."""
    if whole == 0:
        return None
    return part / whole
