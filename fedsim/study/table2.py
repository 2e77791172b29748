"""The paper's Table 2 from counts by seed: the guard before and after fine-tuning."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedsim.base import keyed_random
from fedsim.base.errors import DataError
from fedsim.base.tables import NOT_MEASURED, Table
from fedsim.base.version import commit_of
from fedsim.evaluate.intervals import Mean, near_an_end
from fedsim.record.metrics import Row
from fedsim.report import paper
from fedsim.report.finished import FinishedRun
from fedsim.study.outcomes import check_alike
from fedsim.study.published import Origin

STUDY: Final = "table2"
"""Name of the study among the published ones."""

#: Confusion counts in a metric row: red and called unsafe, acceptable and called unsafe, red and
#: passed, both not.
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

HEAD: Final = ["seed", "point", *COUNTS, "commit"]


@dataclass(frozen=True)
class CountRow:
    """Confusion counts of a guard on the clients' rows under one seed.

    Attributes:
        seed: of the run.
        point: ``untuned`` or ``fine-tuned``.
        counts: in the order of :data:`COUNTS`.
        commit: of the fedsim that measured it.
    """

    seed: int
    point: str
    counts: tuple[int, ...]
    commit: str


def shares(counts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns as shares, each a numerator and a denominator.

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
        found = {}
        for name, (numerator, denominator) in shares(counts).items():
            found[name] = 100.0 * numerator / denominator
        return found


def guard_rows(outcome: FinishedRun) -> dict[str, Row]:
    """The run's guard rows: ``untuned`` where it was measured, and ``fine-tuned``."""
    by_point = {}
    for row in outcome.rows:
        if f"guard/{COUNTS[0]}" in row:
            by_point[str(row.get("point"))] = row
    return {point: by_point[point] for point in ("untuned", "fine-tuned") if point in by_point}


def intervals(counts: np.ndarray) -> dict[str, tuple[float, float, float] | None]:
    """Mean over seeds and 95 % interval of every column.

    Over several seeds it is Student's over their rates, which vary with the rows too; one seed's
    rows are resampled. Near an end of the scale the interval also holds Wilson's for the rows of a
    seed.

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

        # Student's interval over seeds; of one seed, over its rows.
        mean = Mean.of(values.tolist())
        low, high = mean.low, mean.high
        if len(counts) == 1:
            low, high = _resampled(counts[0], name)
        num_rows = float(parts[name][1].mean())
        found[name] = (mean.value, *near_an_end(mean.value, low, high, 100.0, num_rows))
    return found


def _resampled(counts: np.ndarray, name: str) -> tuple[float, float]:
    """Percentile interval of a rate over the rows of one seed, int64 ``[4]``."""
    rng = np.random.default_rng(keyed_random.derive(0, "table2", *counts.tolist()))
    drawn = rates(rng.multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES))[name]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def count_rows(outcomes: Sequence[FinishedRun]) -> list[CountRow]:
    """The counts of both guards by seed; of a guard that was not measured there are none.

    Raises:
        DataError: the runs are not seeds of one arm.
    """
    check_alike(outcomes)
    rows = []
    for outcome in outcomes:
        for point, row in guard_rows(outcome).items():
            counts = tuple(int(row[f"guard/{name}"]) for name in COUNTS)
            rows.append(CountRow(outcome.config.seed, point, counts, commit_of(outcome.manifest)))
    return rows


def write_count_rows(path: Path, rows: Sequence[CountRow]) -> None:
    """Write the CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerows([row.seed, row.point, *row.counts, row.commit] for row in rows)


def read_count_rows(path: Path) -> list[CountRow]:
    """Read what :func:`write_count_rows` wrote.

    Raises:
        DataError: the file is missing or malformed.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        if lines[0] != HEAD:
            raise ValueError(f"its first line is not {','.join(HEAD)}")
        rows = []
        for line in lines[1:]:
            seed, point, *numbers, commit = line
            counts = tuple(int(number) for number in numbers)
            if len(counts) != len(COUNTS):
                raise ValueError(f"a row has {len(counts)} counts")
            rows.append(CountRow(int(seed), point, counts, commit))
        return rows
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(
            f"{path}: is no file of table 2's counts ({error}); make the table again",
        ) from error


def guard_table(rows: Sequence[CountRow]) -> Table:
    """Both guards over all seeds, each with the paper's line under it."""
    lines = []
    num_seeds = len({row.seed for row in rows})
    for point, label in (("untuned", "Llama Guard 3"), ("fine-tuned", "fine-tuned Llama Guard 3")):
        # Measured, int64 [num_seeds, 4]; only if every seed has the guard.
        counts = np.array([row.counts for row in rows if row.point == point], dtype=np.int64)
        if num_seeds and len(counts) == num_seeds:
            cells = [_shown(found) for found in intervals(counts).values()]
        else:
            cells = [NOT_MEASURED] * len(COLUMNS)
        lines.append([f"guard, {point}", *cells])

        # Published.
        figures = {**vars(paper.TABLE_2[label]), "red_share_before": 100 * paper.RED_SHARE}
        cells = [f"{figures[name]:.1f}" if name in figures else "" for name in COLUMNS]
        lines.append([f"– {label} in the paper", *cells])
    return Table(["", *COLUMNS.values()], lines)


def untuned_note(rows: Sequence[CountRow]) -> str:
    """Reason and remedy for an empty row of the untuned guard; "" where it was measured."""
    measured = {row.seed for row in rows if row.point == "untuned"}
    if measured == {row.seed for row in rows} and measured:
        return ""
    return "The untuned guard was not measured: guard.measure_untuned=true makes runs that measure it."


def note(origin: Origin, rows: Sequence[CountRow]) -> str:
    """Note under the table."""
    seeds = ", ".join(map(str, origin.seeds))
    parts = [
        f"Positive = red. {len(origin.seeds)} seed(s): {seeds}. [low, high] = 95 % "
        "interval over seeds and rows. Undefined: in some seed the guard called no row unsafe.",
        untuned_note(rows),
        CHOSEN if origin.embedded else "",
        origin.measured,
    ]
    return " ".join(part for part in parts if part)


CHOSEN: Final = (
    "The embedded guard's fine-tuning epochs (guard.tune_epochs) were chosen so that it errs "
    "about as much as the paper's: that its row is near the paper's is no result."
)
"""A caution about the embedded world's guard."""


def _shown(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "undefined"
    mean, low, high = found
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
