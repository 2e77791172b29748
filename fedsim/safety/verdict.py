"""What a guard says about a row, and how right it was (positive class: unsafe, truth: red).

The metrics are those of the paper's Table 2 (arXiv 2502.16691): accuracy, precision, recall and their harmonic mean,
plus what the filter does to the data: the red share before and after, and how many rows it drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A guard's judgement of one row.

    Attributes:
        unsafe: whether the row is to be filtered.
        unsafe_prob: the guard's probability of "unsafe", 0 … 1.
        cut: the conversation was too long for the guard and lost its end.
    """

    unsafe: bool
    unsafe_prob: float
    cut: bool = False


@dataclass(frozen=True)
class GuardMetrics:
    """Confusion counts of a guard over labelled rows. Every rate is a share (0 … 1), None where it is 0 / 0.

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
        """All rows judged."""
        return self.num_caught + self.num_false_alarms + self.num_missed + self.num_passed

    @property
    def num_red(self) -> int:
        """Rows labelled red."""
        return self.num_caught + self.num_missed

    @property
    def num_dropped(self) -> int:
        """Rows called unsafe: those that the drop action removes."""
        return self.num_caught + self.num_false_alarms

    @property
    def accuracy(self) -> float | None:
        """Share of rows judged as labelled."""
        return _share(self.num_caught + self.num_passed, self.num_rows)

    @property
    def precision(self) -> float | None:
        """Share of red rows among those called unsafe."""
        return _share(self.num_caught, self.num_dropped)

    @property
    def recall(self) -> float | None:
        """Share of red rows that were called unsafe (true-positive rate)."""
        return _share(self.num_caught, self.num_red)

    @property
    def hmean(self) -> float | None:
        """Harmonic mean of precision and recall (F1); 0 if nothing red was caught."""
        return _share(2 * self.num_caught, self.num_dropped + self.num_red)

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
        """Share of red rows among those that are kept."""
        return _share(self.num_missed, self.num_rows - self.num_dropped)

    @property
    def dropped_share(self) -> float | None:
        """Share of rows that the drop action removes."""
        return _share(self.num_dropped, self.num_rows)

    def as_metrics(self) -> dict[str, float | int]:
        """Counts and rates as ``guard/<name>``; rates in percent, undefined ones absent."""
        counts = {
            "num_rows": self.num_rows,
            "num_red": self.num_red,
            "num_dropped": self.num_dropped,
            "num_caught": self.num_caught,
            "num_false_alarms": self.num_false_alarms,
            "num_missed": self.num_missed,
            "num_passed": self.num_passed,
            "num_cut": self.num_cut,
        }
        rates = {
            "accuracy": self.accuracy,
            "precision": self.precision,
            "recall": self.recall,
            "hmean": self.hmean,
            "fpr": self.fpr,
            "red_share_before": self.red_share_before,
            "red_share_after": self.red_share_after,
            "dropped_share": self.dropped_share,
        }
        percent = {f"guard/{name}": 100.0 * rate for name, rate in rates.items() if rate is not None}
        return {**{f"guard/{name}": count for name, count in counts.items()}, **percent}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
