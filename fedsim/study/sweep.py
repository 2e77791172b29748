"""What a sweep found: a tidy record for every point and seed, estimates over seeds, and differences in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from fedsim.config import to_flat
from fedsim.study.effects import Effect, detectable, difference, estimate, shown_detectable
from fedsim.study.grid import Comparison, Sweep, point_name
from fedsim.study.outcomes import Outcome, sample
from fedsim.study.table1 import scale_of

#: Figures of the item files that are points rather than shares.
POINTS: Final = ("mt_bench", "mt_bench_turn_1", "mt_bench_turn_2")

TITLES: Final = {
    "advbench_harmless": "AdvBench: harmless replies, %",
    "hhh_accuracy": "HHH: right choices, %",
    "mt_bench": "MT-Bench: mean score, 1–10",
    "xstest_safe_refused": "XSTest: innocent prompts refused, %",
}

#: Figures of a run that are no configuration keys, for a sweep's axes: where its metric rows have them.
GUARD_PREFIX: Final = "guard/"

Runs = Mapping[str, Sequence[Outcome]]
"""Point name → its finished runs, in the order of the seeds."""


def title(figure: str) -> str:
    """A figure's name for people."""
    return TITLES.get(figure, figure.replace("_", " "))


def figure_sample(outcomes: Sequence[Outcome], figure: str) -> np.ndarray | None:
    """fp64 ``[num_seeds, num_items]`` of the final model, in percent or points; None where it was not measured.

    ``advbench_harmless`` and ``hhh_accuracy`` stand for the configuration's headline rule and scorer.
    """
    first = outcomes[0].config.eval
    names = {
        "advbench_harmless": f"advbench_harmless_{first.advbench_phrases.replace('-', '_')}",
        "hhh_accuracy": f"hhh_{first.hhh_scorer}",
    }
    return sample(outcomes, "final", names.get(figure, figure), 1.0 if figure in POINTS else 100.0)


def axis_value(outcomes: Sequence[Outcome], x: str) -> float | str:
    """Where a point lies on an axis: a configuration value, or the mean of a guard's figure over the runs."""
    if x.startswith(GUARD_PREFIX):
        found = [row[x] for outcome in outcomes for row in outcome.rows if row["stage"] == "filter" and x in row]
        return float(np.mean(found)) if found else float("nan")
    value = to_flat(outcomes[0].config)[x]
    if x == "cai.iterations" and value == -1:  # an epoch: as many as it took
        value = max(row.get("cai/num_iterations", 0) for row in outcomes[0].rows)
    return value if isinstance(value, str) else float(value)


def tidy_rows(sweep: Sweep, runs: Runs) -> list[dict[str, Any]]:
    """One record per point, seed and figure: what was set, what the run cost, what it measured."""
    records = []
    for point in sweep.points:
        outcomes = runs[point_name(point)]
        for outcome in outcomes:
            shared = {
                "point": point_name(point),
                **point,
                "seed": outcome.config.seed,
                "minutes": outcome.total_s / 60,
                "cai_minutes": outcome.phase_s("cai") / 60,
            }
            for figure in sweep.figures:
                values = figure_sample([outcome], figure)
                if values is not None:
                    records.append({**shared, "figure": figure, "value": float(values.mean())})
    return records


def estimates(sweep: Sweep, runs: Runs, figure: str) -> dict[str, Effect]:
    """Point name → mean over seeds and items with its 95 % interval; points without the figure are left out."""
    found = {}
    for point in sweep.points:
        values = figure_sample(runs[point_name(point)], figure)
        if values is not None:
            found[point_name(point)] = estimate(values, scale_of(figure))
    return found


def finding(comparison: Comparison, runs: Runs) -> str:
    """A paired difference between two points in one sentence, from its interval alone."""
    treated, control = (runs[point_name(point)] for point in (comparison.treated, comparison.control))
    ours, theirs = figure_sample(treated, comparison.figure), figure_sample(control, comparison.figure)
    versus = f"{_point_title(comparison.treated)} against {_point_title(comparison.control)}"
    name = title(comparison.figure).split(":")[0]
    if ours is None or theirs is None:
        return f"{name}, {versus}: not measured."
    scale = scale_of(comparison.figure)
    effect = difference(ours, theirs, scale)
    digits = 2 if comparison.figure in POINTS else 1
    interval = effect.shown(digits, "+")
    if effect.num_seeds == 1:
        return f"{name}, {versus}: {interval} points, which one seed cannot tell from chance."
    if effect.sign != 0:
        word = "higher" if effect.sign > 0 else "lower"
        return f"{name} is {word}, {versus}: {interval} points over {effect.num_seeds} seed(s)."
    smallest = shown_detectable(detectable(ours, theirs), digits, scale)
    could = f"; {effect.num_seeds} seeds would show {smallest}" if smallest else ""
    return f"{name} cannot be told apart, {versus}: {interval} points{could}."


def _point_title(point: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
