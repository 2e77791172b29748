"""Pictures in words, for those who cannot see them, and how many items stand behind a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.record.tables import duration, measured
from fedsim.report.arms import arm_figure, grouped, item_counts
from fedsim.report.runs import Run


def in_words(runs: Sequence[Run], name: str) -> str:
    """The figure of every group at the end of training."""
    found = {group.name: arm_figure(group.runs, name) for group in grouped(runs)}
    return "; ".join(f"{group}: {figure.shown(1)}" for group, figure in found.items() if figure is not None)


def items(runs: Sequence[Run], count: str) -> str:
    """How many items a benchmark had, as the end of a list: ``, 120 items``; nothing where it is not known."""
    found = item_counts(runs, count)
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
