"""Arms of several runs: figures with intervals, over seeds where there are several, beside the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.evaluate.intervals import Mean
from fedsim.record import paper
from fedsim.record.metrics import Row
from fedsim.record.summary import BENCHMARKS, Benchmark
from fedsim.record.tables import NOT_MEASURED, Table, measured
from fedsim.report.runs import Run


@dataclass(frozen=True)
class Figure:
    """A figure of an arm and its 95 % interval, which a single score without spread lacks, over ``num_seeds`` seeds."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def reach(self) -> list[list[float]] | None:
        """How far the interval goes down and up, as error bars take it; None without one."""
        if self.low is None or self.high is None:
            return None
        return [[max(self.value - self.low, 0.0)], [max(self.high - self.value, 0.0)]]

    def shown(self, digits: int) -> str:
        """``97.5 [95.8, 98.5]``, with the number of runs where there are several."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{interval}" + (f", n = {self.num_seeds}" if self.num_seeds > 1 else "")


def by_arm(runs: Sequence[Run]) -> dict[tuple[str, bool, bool], list[Run]]:
    """Runs that differ in nothing that names an arm, in the paper's order of methods."""
    arms: dict[tuple[str, bool, bool], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.arm[0], run.arm[2], run.arm[1])):
        arms.setdefault(run.arm, []).append(run)
    return arms


def arm_figure(runs: Sequence[Run], name: str, point: str = "final") -> Figure | None:
    """The figure at the end of training (or at ``point``): one run's own interval, or Student's over several seeds.

    Runs of one seed share its draws and count once, as their mean.
    """
    by_seed: dict[int, list[tuple[float, Row]]] = {}
    for run in runs:
        row = run.final if point == "final" else run.points.get(point)
        if row is not None and (value := measured(row, name)) is not None:
            by_seed.setdefault(run.facts.seed, []).append((value, row))
    if not by_seed:
        return None
    means = [math.fsum(value for value, _ in found) / len(found) for found in by_seed.values()]
    if len(means) == 1:
        (found,) = by_seed.values()
        row = found[0][1]
        if len({value for value, _ in found}) > 1:
            return Figure(means[0], None, None, 1)
        return Figure(means[0], measured(row, f"{name}_low"), measured(row, f"{name}_high"), 1)
    mean = Mean.of(means)
    top = 10.0 if name == "eval/mt_bench" else 100.0
    return Figure(mean.value, max(mean.low, 1.0 if top == 10.0 else 0.0), min(mean.high, top), mean.count)


def pretrained_figure(runs: Sequence[Run], name: str) -> Figure | None:
    """The figure before training."""
    return arm_figure(runs, name, "pretrained")


def table_1(runs: Sequence[Run]) -> Table | None:
    """Pretrained model and arms, each benchmark beside the paper's; None where no run was evaluated."""
    if not any(run.points for run in runs):
        return None
    start = [pretrained_figure(runs, benchmark.metric) for benchmark in BENCHMARKS]
    lines = [["pretrained", "", *_cells(start, paper.TABLE_1["fedavg"][paper.PRETRAINED])]]
    for arm, members in by_arm(runs).items():
        ends = [arm_figure(members, benchmark.metric) for benchmark in BENCHMARKS]
        seeds = ", ".join(str(run.facts.seed) for run in members)
        lines.append([paper.arm_name(*arm), seeds, *_cells(ends, paper.paper_row(*arm))])
    head = ["arm", "seeds"]
    for benchmark in BENCHMARKS:
        head += [_heading(benchmark, runs), "paper"]
    return Table(head, lines)


def headlines(runs: Sequence[Run]) -> list[str]:
    """What each method did beside plain federated training, one sentence an aggregation; none without such arms."""
    arms, lines = by_arm(runs), []
    for (algorithm, filtered, cai), plain in arms.items():
        if filtered or cai:
            continue
        others = {arm: found for arm, found in arms.items() if arm[0] == algorithm and found is not plain}
        for benchmark in BENCHMARKS:
            base, start = arm_figure(plain, benchmark.metric), pretrained_figure(runs, benchmark.metric)
            if base is None:
                continue
            words = [
                f"{paper.method_name(arm[1], arm[2])} {figure.value:.{benchmark.digits}f}"
                for arm, found in others.items()
                if (figure := arm_figure(found, benchmark.metric)) is not None
            ]
            before = "" if start is None else f" (pretrained {start.value:.{benchmark.digits}f})"
            beside = f"; {', '.join(words)}" if words else ""
            name = paper.ALGORITHM_NAMES[algorithm]
            lines.append(f"{benchmark.title}, {name}: FL {base.value:.{benchmark.digits}f}{before}{beside}.")
    return lines


def _cells(figures: Sequence[Figure | None], published: paper.SafetyRow | None) -> list[str]:
    shown = [
        NOT_MEASURED if figure is None else figure.shown(benchmark.digits)
        for figure, benchmark in zip(figures, BENCHMARKS, strict=True)
    ]
    printed = ("–",) * 3
    if published is not None:
        printed = (str(published.advbench_harmless), str(published.hhh_accuracy), str(published.mt_bench))
    return [cell for pair in zip(shown, printed, strict=True) for cell in pair]


def _heading(benchmark: Benchmark, runs: Sequence[Run]) -> str:
    shown = item_counts(runs, benchmark.count)
    return f"{benchmark.title} (n = {shown})" if shown else benchmark.title


def item_counts(runs: Sequence[Run], name: str) -> str:
    """How many items a benchmark had, such as ``130``; every number there was, ``120/130``, and "" if none is known."""
    counts = {measured(row, name) for run in runs for row in run.points.values()}
    return "/".join(f"{count:,.0f}" for count in sorted(count for count in counts if count is not None))
