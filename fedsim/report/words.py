"""Pictures in words, for those who cannot see them, and how many items stand behind a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.base.figures import Figure
from fedsim.base.tables import duration, measured
from fedsim.report.arms import arm_figure, grouped, item_counts
from fedsim.report.runs import Run


def in_words(runs: Sequence[Run], figure: Figure) -> str:
    """The figure of every group at the end of training."""
    words = []
    for group in grouped(runs):
        estimate = arm_figure(group.runs, figure)
        if estimate is not None:
            words.append(f"{group.name}: {estimate.shown(1)}")
    return "; ".join(words)


def items(runs: Sequence[Run], figure: Figure) -> str:
    """How many items a figure is over, as the end of a list: ``, 120 items``; nothing where it is not known."""
    found = item_counts(runs, figure)
    return f", {found} items" if found else ""


def losses_in_words(run: Run) -> str:
    """The mean loss of the first round and of the last."""
    values = [value for row in run.rows if (value := measured(row, "client/loss")) is not None]
    means = f"{values[0]:.2f} nats in the first round, {values[-1]:.2f} in the last" if values else "not measured"
    return f"{run.title}: dots of clients over rounds, and a line of their mean: {means}"


def times_in_words(run: Run) -> str:
    """The whole time."""
    taken = f"{duration(run.facts.total_s)} over {run.facts.num_rounds} rounds"
    return f"{run.title}: stacked bars, one a round: {taken}"


def idle_in_words(runs: Sequence[Run]) -> str:
    """The mean idle share of every run."""
    means = []
    for run in runs:
        values = [value for row in run.rows if (value := measured(row, "parallel/idle_share")) is not None]
        if values:
            means.append(f"{run.title}: {100 * sum(values) / len(values):.0f} %")
    return f"Lines over rounds: idle share, mean {'; '.join(means)}"
