"""Pictures in words, for readers who cannot see them, and the number of items behind a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.base.figures import Figure
from fedsim.base.tables import duration
from fedsim.report.arms import arm_figure, grouped, item_counts
from fedsim.report.runs import Run
from fedsim.report.sections import values_of


def in_words(runs: Sequence[Run], figure: Figure) -> str:
    """State the figure of every group at the end of training."""
    words = []
    for group in grouped(runs):
        estimate = arm_figure(group.runs, figure)
        if estimate is not None:
            words.append(f"{group.name}: {estimate.shown(1)}")
    return "; ".join(words)


def items(runs: Sequence[Run], figure: Figure) -> str:
    """State how many items a figure is over, to end a list: ``, 120 items``; "" if not known."""
    found = item_counts(runs, figure)
    if not found:
        return ""
    return f", {found} items"


def losses_in_words(run: Run) -> str:
    """State the mean loss of the first round and of the last, in nats per token."""
    losses = values_of(run.rows, "client/loss")
    means = "not measured"
    if losses:
        means = f"{losses[0]:.2f} nats in the first round, {losses[-1]:.2f} in the last"
    return f"{run.title}: dots of clients over rounds, and a line of their mean: {means}"


def times_in_words(run: Run) -> str:
    """State the run's whole time."""
    taken = f"{duration(run.total_s)} over {run.facts.num_rounds} rounds"
    return f"{run.title}: stacked bars, one a round: {taken}"


def idle_in_words(runs: Sequence[Run]) -> str:
    """State the mean idle share of every run, in percent."""
    means = []
    for run in runs:
        shares = values_of(run.rows, "parallel/idle_share")
        if shares:
            means.append(f"{run.title}: {100 * sum(shares) / len(shares):.0f} %")
    return f"Lines over rounds: idle share, mean {'; '.join(means)}"
