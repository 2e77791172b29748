"""A sweep's findings: tidy records by point and seed, estimates over seeds, differences in words.

Estimates and differences are made from the records only, so that a committed file of them gives
the published page. Their intervals count seeds as draws; the prompts are one fixed set.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedsim.base.errors import DataError
from fedsim.base.version import commit_of
from fedsim.config import to_flat
from fedsim.evaluate.own import DESCRIBED, chosen_figures
from fedsim.report.finished import FinishedRun
from fedsim.study.grid import Comparison, Sweep, point_name
from fedsim.study.outcomes import sample
from fedsim.study.statistics import Effect, detectable, difference, estimate, shown_detectable
from fedsim.study.table1 import scale_of

#: Figures of a run that are no configuration keys, for a sweep's axes: where its metric rows have
#: them.
GUARD_PREFIX: Final = "guard/"

Runs = Mapping[str, Sequence[FinishedRun]]
"""Point name → its finished runs, in the order of the seeds."""

Record = Mapping[str, Any]
"""A point, a seed and a figure: settings, place on the axis (``x``), and measured ``value``."""


def title(figure: str) -> str:
    """A figure's name for people."""
    known = DESCRIBED.of(figure)
    if known is not None and known.name == figure:
        return known.label
    return figure.replace("_", " ")


def _measured(outcome: FinishedRun, figure: str) -> float | None:
    """A figure of the final model, in percent or points; None where it was not measured.

    A headline figure such as ``advbench_harmless`` means that of the configuration's rule or
    scorer.
    """
    name = chosen_figures(outcome.config.eval).get(figure, figure)
    known = outcome.benchmarks.of(name)
    factor = 100.0 if known is None else known.factor
    values = sample([outcome], "final", name, factor)
    return None if values is None else float(values.mean())


def axis_value(outcomes: Sequence[FinishedRun], x: str) -> float | str:
    """Place of a point on an axis: a configuration value, or a guard's figure, mean over runs."""
    if x.startswith(GUARD_PREFIX):
        found = []
        for outcome in outcomes:
            for row in outcome.rows:
                if row["stage"] == "filter" and x in row:
                    found.append(row[x])
        return float(np.mean(found)) if found else float("nan")
    value = to_flat(outcomes[0].config)[x]
    if x == "cai.iterations" and value == -1:  # an epoch: as many as it took
        value = max(row.get("cai/num_iterations", 0) for row in outcomes[0].rows)
    return value if isinstance(value, str) else float(value)


def tidy_rows(sweep: Sweep, runs: Runs) -> list[dict[str, Any]]:
    """One record per point, seed and figure: settings, run time, measured value."""
    records = []
    for point in sweep.points:
        outcomes = runs[point_name(point)]
        x = axis_value(outcomes, sweep.x)
        for outcome in outcomes:
            # Columns that all figures of a run share.
            shared = {
                "point": point_name(point),
                **point,
                "seed": outcome.config.seed,
                "commit": commit_of(outcome.manifest),
                "x": x,
                "minutes": outcome.total_s / 60,
                "cai_minutes": outcome.phase_s("cai") / 60,
            }
            for figure in sweep.figures:
                value = _measured(outcome, figure)
                if value is not None:
                    records.append({**shared, "figure": figure, "value": value})
    return records


def read_records(path: Path) -> list[Record]:
    """The records of a CSV file, as texts.

    Raises:
        DataError: the file cannot be read or is none of :func:`tidy_rows`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            records: list[Record] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); restore it, or run the sweep again",
        ) from error
    if not records or not {"point", "seed", "x", "figure", "value"} <= set(records[0]):
        raise DataError(
            f"{path}: is no file of a sweep's records; restore it, or run the sweep again",
        )
    return records


def figure_sample(
    records: Sequence[Record],
    point: Mapping[str, Any],
    figure: str,
) -> np.ndarray | None:
    """fp64 ``[num_seeds, 1]`` of a point, ascending by seed; None where it was not measured."""
    wanted = (point_name(point), figure)
    found = {}
    for record in records:
        if (record["point"], record["figure"]) == wanted:
            found[int(record["seed"])] = float(record["value"])
    if not found:
        return None
    return np.array([[found[seed]] for seed in sorted(found)], dtype=np.float64)


def estimates(sweep: Sweep, records: Sequence[Record], figure: str) -> dict[str, Effect]:
    """Point name → mean over seeds with its 95 % interval, where the figure was measured."""
    found = {}
    for point in sweep.points:
        values = figure_sample(records, point, figure)
        if values is not None:
            found[point_name(point)] = estimate(values, scale_of(figure))
    return found


def finding(comparison: Comparison, records: Sequence[Record]) -> str:
    """A paired difference between two points in one sentence, from its interval only."""
    # Values by seed [num_seeds, 1], and names for people.
    ours = figure_sample(records, comparison.treated, comparison.figure)
    theirs = figure_sample(records, comparison.control, comparison.figure)
    name = title(comparison.figure).split(":")[0]
    known = DESCRIBED.of(comparison.figure)
    digits = 1 if known is None else known.digits
    treated, control = _point_title(comparison.treated), _point_title(comparison.control)
    if ours is None or theirs is None:
        return f"{name}, {treated} against {control}: not measured."

    # The difference, and by its interval the sentence.
    versus = f"{treated} ({ours.mean():.{digits}f}) against {control} ({theirs.mean():.{digits}f})"
    scale = scale_of(comparison.figure)
    effect = difference(ours, theirs, scale)
    interval = effect.shown(digits, "+")
    if effect.num_seeds == 1:
        return f"{name}, {versus}: {interval} points, which one seed cannot tell from chance."
    if effect.sign != 0:
        word = "higher" if effect.sign > 0 else "lower"
        return f"{name} is {word}, {versus}: {interval} points over {effect.num_seeds} seeds."
    smallest = shown_detectable(detectable(ours, theirs), digits, scale)
    line = f"{name} cannot be told apart, {versus}: {interval} points"
    if smallest:
        line += f"; {effect.num_seeds} seeds would show {smallest}"
    return f"{line}."


def _point_title(point: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
