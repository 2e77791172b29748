"""Pictures in words, for those who cannot see them, and how many items stand behind a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.record import paper
from fedsim.record.tables import duration, measured
from fedsim.report.arms import arm_figure, by_arm, item_counts
from fedsim.report.runs import Run


def in_words(runs: Sequence[Run], name: str) -> str:
    """The figure of every arm at the end of training."""
    found = {paper.arm_name(*arm): arm_figure(members, name) for arm, members in by_arm(runs).items()}
    return "; ".join(f"{arm}: {figure.shown(1)}" for arm, figure in found.items() if figure is not None)


def items(runs: Sequence[Run], count: str) -> str:
    """How many items a benchmark had, as the end of a list: ``, 120 items``; nothing where it is not known."""
    found = item_counts(runs, count)
    return f", {found} items" if found else ""


def losses_in_words(run: Run) -> str:
    """The mean loss of the first round and of the last."""
    values = [value for row in run.rows if (value := measured(row, "client/loss")) is not None]
    told = f"{values[0]:.2f} nats in the first round, {values[-1]:.2f} in the last" if values else "not measured"
    return f"{run.facts.name}: dots of clients over rounds, and a line of their mean: {told}"


def times_in_words(run: Run) -> str:
    """The whole time."""
    return (
        f"{run.facts.name}: stacked bars, one a round: {duration(run.facts.total_s)} over {run.facts.num_rounds} rounds"
    )


def idle_in_words(runs: Sequence[Run]) -> str:
    """The mean idle share of every run."""
    means = [
        f"{run.facts.name}: {100 * sum(values) / len(values):.0f} %"
        for run in runs
        if (values := [v for row in run.rows if (v := measured(row, "parallel/idle_share")) is not None])
    ]
    return f"Lines over rounds: idle share, mean {'; '.join(means)}"
