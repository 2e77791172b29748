"""Cost of CAI as the paper states it: a round's epoch of iterations or few (paper §4.2, §6.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fedsim.base.tables import Table, duration
from fedsim.report import paper


@dataclass(frozen=True)
class Steps:
    """Seconds of the timed steps, in order: one SFT and one DPO step an iteration."""

    sft_s: list[float]
    dpo_s: list[float]

    @property
    def iteration_s(self) -> float:
        """Mean seconds of an iteration."""
        return self.total_s / len(self.sft_s)

    @property
    def total_s(self) -> float:
        """Seconds of all timed steps."""
        return math.fsum(self.sft_s) + math.fsum(self.dpo_s)

    def first(self, count: int) -> Steps:
        """The first ``count`` iterations only."""
        return Steps(self.sft_s[:count], self.dpo_s[:count])


@dataclass(frozen=True)
class Cost:
    """Times that were measured, and the counts of the run.

    Attributes:
        steps: the timed ones.
        extrapolated_from: iterations that an extrapolation takes.
        full_epoch: ``steps`` are a whole epoch.
        num_rows: conversations that a run can train on: as large a share of ``asked_rows`` as of
            those written here.
        batch_size: rows of a step.
        round_iterations: iterations of a round (``cai.iterations``).
        num_rounds: rounds of the run that have CAI.
        written_rows: conversations that were written to time the writing.
        written_s: seconds that took.
        asked_rows: conversations that a run writes.
    """

    steps: Steps
    extrapolated_from: int
    full_epoch: bool
    num_rows: int
    batch_size: int
    round_iterations: int
    num_rounds: int
    written_rows: int
    written_s: float
    asked_rows: int

    @property
    def epoch_iterations(self) -> int:
        """Iterations of the configuration's own epoch; the last batch is filled up."""
        return epoch_iterations(self.num_rows, self.batch_size)

    @property
    def epoch_s(self) -> float:
        """Seconds of that epoch: measured, or the mean iteration times their number."""
        if self.full_epoch:
            return self.steps.total_s
        return self.epoch_iterations * self.steps.iteration_s

    @property
    def extrapolated_s(self) -> float:
        """Seconds of that epoch, extrapolated from its first iterations."""
        return self.epoch_iterations * self.steps.first(self.extrapolated_from).iteration_s

    @property
    def writing_s(self) -> float:
        """Seconds of writing all conversations, once."""
        return self.written_s / self.written_rows * self.asked_rows


def epoch_iterations(num_rows: int, batch_size: int) -> int:
    """Iterations that use every row once."""
    return math.ceil(num_rows / batch_size)


def at_paper_counts(iteration_s: float) -> dict[str, float]:
    """Seconds of three of the paper's costs, by name, from those of an iteration."""
    few = paper.CAI_ITERATIONS * iteration_s
    return {
        "cai_epoch": paper.CAI_EPOCH_ITERATIONS * iteration_s,
        "cai_round": few,
        "cai": paper.NUM_ROUNDS * few,
    }


def table(cost: Cost) -> Table:
    """The paper's table beside the measured times and projections from them."""
    # Counts: the paper's, and this configuration's.
    epoch, few, rounds = paper.CAI_EPOCH_ITERATIONS, paper.CAI_ITERATIONS, paper.NUM_ROUNDS
    num_written, num_rounds = paper.NUM_CAI_ROWS, cost.num_rounds

    # Seconds: printed by the paper, here at the paper's counts, here as configured.
    names = ("cai_epoch", "cai_round", "cai")
    printed = {name: 60 * paper.COSTS[name].minutes for name in names}
    here = cost.steps.iteration_s
    counted = at_paper_counts(here)
    own_round = cost.round_iterations * here
    row_s = cost.written_s / cost.written_rows
    epochs = [printed["cai_epoch"], counted["cai_epoch"], cost.epoch_s]
    few_each = [printed["cai_round"], counted["cai_round"], own_round]
    all_epochs = [rounds * epochs[0], rounds * epochs[1], num_rounds * epochs[2]]
    all_few = [printed["cai"], counted["cai"], num_rounds * own_round]
    iterations = [printed["cai_round"] / few, here, here]
    savings = [saved(whole, part) for whole, part in zip(epochs, few_each, strict=True)]
    writing = [time_text(row_s * num_written), time_text(cost.writing_s)]

    lines = [
        ["iterations of an epoch", f"{epoch:,}", f"{epoch:,}", f"{cost.epoch_iterations:,}"],
        ["iterations of a round", f"{few:,}", f"{few:,}", f"{cost.round_iterations:,}"],
        ["one iteration (SFT + DPO step)", *map(time_text, iterations)],
        ["a round with a whole epoch", *map(time_text, epochs)],
        ["a round with few iterations", *map(time_text, few_each)],
        ["saved by that", *savings],
        ["rounds with CAI", f"{rounds}", f"{rounds}", f"{num_rounds}"],
        ["all rounds with an epoch each", *map(time_text, all_epochs)],
        ["all rounds with few iterations", *map(time_text, all_few)],
        [
            "conversations, written once",
            f"{num_written:,}",
            f"{num_written:,}",
            f"{cost.asked_rows:,}",
        ],
        ["writing them", "not stated", *writing],
    ]

    # Numbers are set flush right.
    head = ["", "paper, 4 x A100", "here, the paper's counts", "here, this configuration"]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    right = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        right.append([line[0], *cells[1:]])
    return Table(head, right)


def time_text(seconds: float) -> str:
    """``37 ms``, ``3.84 s`` or ``1 h 20 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    return duration(seconds)


def saved(whole: float, part: float) -> str:
    """Difference of ``part`` from ``whole``, such as ``-96 %``."""
    return f"{100 * (part / whole - 1):+.0f} %"


def page(cost: Cost, heading: str) -> str:
    """The text that the command prints."""
    steps = cost.steps
    count = len(steps.sft_s)
    sft, dpo = (math.fsum(seconds) / count for seconds in (steps.sft_s, steps.dpo_s))
    lines = [
        heading,
        "",
        table(cost).plain(),
        "",
        f"timed: {count} iteration(s), an SFT step {time_text(sft)} and a DPO step "
        f"{time_text(dpo)} on average; {cost.num_rows:,} rows / {cost.batch_size} = "
        f"{cost.epoch_iterations:,} iterations an epoch (paper: {paper.NUM_CAI_ROWS:,} / "
        f"{paper.BATCH_SIZE} = {paper.CAI_EPOCH_ITERATIONS:,})",
        f"writing: timed on {cost.written_rows:,} of {cost.asked_rows:,} conversations, {time_text(cost.written_s)}",
    ]
    if cost.full_epoch:
        off = 100 * (cost.extrapolated_s / cost.epoch_s - 1)
        lines.append(
            f"the whole epoch took {time_text(cost.epoch_s)}; its first {cost.extrapolated_from} "
            f"iteration(s) would have foretold {time_text(cost.extrapolated_s)}, {off:+.1f} %"
        )
    else:
        lines.append("the epoch is extrapolated; --full-epoch runs it")
    return "\n".join(lines)


def row(cost: Cost, facts: Mapping[str, object]) -> dict[str, object]:
    """The JSON row: measured times, projections from them, and facts of the machine."""
    return {
        **asdict(cost),
        "iteration_s": cost.steps.iteration_s,
        "epoch_iterations": cost.epoch_iterations,
        "epoch_s": cost.epoch_s,
        "extrapolated_s": cost.extrapolated_s,
        "writing_s": cost.writing_s,
        **facts,
    }
