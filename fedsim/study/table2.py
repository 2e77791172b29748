"""The paper's Table 2 from finished runs: the guard before and after fine-tuning, and the red share that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedsim import keys
from fedsim.evaluate.intervals import Mean, near_an_end
from fedsim.record import paper
from fedsim.record.metrics import Row
from fedsim.record.tables import NOT_MEASURED, Table
from fedsim.study.outcomes import Outcome, check_alike

#: Confusion counts in a metric row: red and called unsafe, acceptable and called unsafe, red and passed, both not.
COUNTS: Final = ("num_caught", "num_false_alarms", "num_missed", "num_passed")

#: Columns: name → title. The first four are the paper's.
COLUMNS: Final = {
    "accuracy": "accuracy %",
    "precision": "precision %",
    "recall": "recall %",
    "hmean": "Hmean %",
    "fpr": "FPR %",
    "red_share_before": "red share before %",
    "red_share_after": "red share after dropping %",
}

NUM_RESAMPLES: Final = 10_000


def shares(counts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns as shares: of how many (second), how many (first).

    Args:
        counts: fp64 ``[..., 4]`` in the order of :data:`COUNTS`.

    Returns:
        Name → two arrays ``[...]``.
    """
    caught, alarms, missed, passed = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    total = caught + alarms + missed + passed
    return {
        "accuracy": (caught + passed, total),
        "precision": (caught, caught + alarms),
        "recall": (caught, caught + missed),
        "hmean": (2 * caught, 2 * caught + alarms + missed),
        "fpr": (alarms, alarms + passed),
        "red_share_before": (caught + missed, total),
        "red_share_after": (missed, missed + passed),
    }


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """:func:`shares` in percent ``[...]``; NaN where a rate is 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: 100.0 * some / of for name, (some, of) in shares(counts).items()}


def guard_rows(outcome: Outcome) -> dict[str, Row]:
    """The run's guard rows: ``untuned`` where it was measured, and ``fine-tuned``."""
    found = {str(row.get("point")): row for row in outcome.rows if f"guard/{COUNTS[0]}" in row}
    return {point: found[point] for point in ("untuned", "fine-tuned") if point in found}


def intervals(counts: np.ndarray) -> dict[str, tuple[float, float, float] | None]:
    """Mean over seeds and 95 % interval of every column.

    Over several seeds it is Student's over their rates, which vary with the rows too; one seed's rows are resampled.
    Near an end of the scale the interval also holds Wilson's for the rows of a seed.

    Args:
        counts: int64 ``[num_seeds, 4]``, in the order of :data:`COUNTS`.

    Returns:
        Name → (mean, low, high) in percent; None where the rate is undefined in some seed.
    """
    measured, parts = rates(counts), shares(counts)
    found: dict[str, tuple[float, float, float] | None] = {}
    for name, values in measured.items():
        if np.isnan(values).any():
            found[name] = None
            continue
        mean = Mean.of(values.tolist())
        low, high = (mean.low, mean.high) if len(counts) > 1 else _resampled(counts[0], name)
        found[name] = (mean.value, *near_an_end(mean.value, low, high, 100.0, float(parts[name][1].mean())))
    return found


def _resampled(counts: np.ndarray, name: str) -> tuple[float, float]:
    """Percentile interval of a rate over the rows of one seed, int64 ``[4]``."""
    rng = np.random.default_rng(keys.derive(0, "table2", *counts.tolist()))
    drawn = rates(rng.multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES))[name]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def guard_table(outcomes: Sequence[Outcome]) -> Table:
    """Both guards over all seeds, each with the paper's line under it.

    Raises:
        DataError: the runs are not seeds of one arm.
    """
    check_alike(outcomes)
    lines = []
    for point, label in (("untuned", "Llama Guard 3"), ("fine-tuned", "fine-tuned Llama Guard 3")):
        rows = [guard_rows(outcome).get(point) for outcome in outcomes]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            counts = np.array([[row[f"guard/{name}"] for name in COUNTS] for row in known], dtype=np.int64)
            lines.append([f"guard, {point}", *(_shown(found) for found in intervals(counts).values())])
        else:
            lines.append([f"guard, {point}", *([NOT_MEASURED] * len(COLUMNS))])
        published = paper.TABLE_2[label]
        figures = {**vars(published), "red_share_before": 100 * paper.RED_SHARE}
        lines.append([f"– {label} in the paper", *(f"{figures[n]:.1f}" if n in figures else "" for n in COLUMNS)])
    return Table(["", *COLUMNS.values()], lines)


def untuned_note(outcomes: Sequence[Outcome]) -> str:
    """Why the untuned guard's row is empty, where it is, and how to fill it."""
    if all("untuned" in guard_rows(outcome) for outcome in outcomes):
        return ""
    return "The untuned guard was not measured: guard.measure_untuned=true makes runs that measure it."


def _shown(found: tuple[float, float, float] | None) -> str:
    return "undefined" if found is None else f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"
