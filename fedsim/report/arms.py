"""Arms of several runs: figures with intervals, over seeds where there are several, beside the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedsim.base.figures import Figure
from fedsim.base.tables import NOT_MEASURED, Table, measured
from fedsim.base.version import commit_of
from fedsim.evaluate.intervals import Mean
from fedsim.record.groups import (
    ARM_SECTIONS,
    Settings,
    differing,
    differing_beside_arms,
    group_names,
    order_of,
    shown_value,
)
from fedsim.record.metrics import Row
from fedsim.report import paper
from fedsim.report.runs import Run
from fedsim.report.summary import NOT_RATED

BASE_SECTIONS = ("model.path", "model.dtype", "model.attention", "model.max_context", "eval.", "judge.")
"""Beginnings of the keys that decide the pretrained model's figures."""

OTHER_POINTS = ("eval.every", "eval.guard_judge")
"""Keys under ``eval.`` that do not."""


@dataclass(frozen=True)
class Estimate:
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


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed and place alone.

    Attributes:
        name: the arm, with the keys that tell it from the report's other groups of that arm.
        runs: by seed.
    """

    name: str
    runs: Sequence[Run]

    @property
    def settings(self) -> Settings:
        """The settings of all its runs."""
        return self.runs[0].settings

    @property
    def algorithm(self) -> str:
        """The aggregation."""
        return self.runs[0].facts.algorithm

    @property
    def method(self) -> str:
        """Filter and CAI in words."""
        return self.runs[0].facts.method

    @property
    def seeds(self) -> list[int]:
        """Each seed once."""
        return sorted({run.facts.seed for run in self.runs})


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Every run in one group, arms in the paper's order, groups of an arm by the values in which they differ."""
    found: list[list[Run]] = []
    for run in runs:
        like = next((group for group in found if group[0].settings == run.settings), None)
        if like is None:
            found.append([run])
        else:
            like.append(run)
    keys = differing([group[0].settings for group in found])
    found.sort(key=lambda group: (*_place(group[0]), order_of(group[0].settings, keys)))
    names = group_names([(group[0].facts.arm, group[0].settings) for group in found])
    by_seed = [sorted(group, key=lambda run: run.facts.seed) for group in found]
    return [Group(name, group) for name, group in zip(names, by_seed, strict=True)]


def _place(run: Run) -> tuple[str, bool, str]:
    """Where an arm stands: FL, FL + filter, FL + CAI, FL + filter + CAI of one aggregation after the other."""
    return run.facts.algorithm, "CAI" in run.facts.method, run.facts.method


def by_base(runs: Sequence[Run]) -> list[Group]:
    """Runs by what they began with: one pretrained model on one set of benchmarks each."""
    found: list[tuple[Settings, list[Run]]] = []
    for run in runs:
        own = base_settings(run.settings)
        like = next((members for settings, members in found if settings == own), None)
        if like is None:
            found.append((own, [run]))
        else:
            like.append(run)
    names = group_names([(paper.PRETRAINED, settings) for settings, _ in found])
    return [Group(name, members) for name, (_, members) in zip(names, found, strict=True)]


def base_settings(settings: Settings) -> Settings:
    """The settings that decide the pretrained model's figures."""
    return {key: value for key, value in settings.items() if key.startswith(BASE_SECTIONS) and key not in OTHER_POINTS}


def arm_figure(runs: Sequence[Run], figure: Figure, point: str = "final") -> Estimate | None:
    """The figure at the end of training (or at ``point``): one run's own interval, or Student's over several seeds.

    Runs of one seed share its draws and count once, as their mean.

    Args:
        runs: of one group.
    """
    by_seed: dict[int, list[tuple[float, Row]]] = {}
    for run in runs:
        row = run.final if point == "final" else run.points.get(point)
        if row is not None and (value := measured(row, figure.metric)) is not None:
            by_seed.setdefault(run.facts.seed, []).append((value, row))
    if not by_seed:
        return None
    means = [math.fsum(value for value, _ in found) / len(found) for found in by_seed.values()]
    if len(means) == 1:
        (found,) = by_seed.values()
        row = found[0][1]
        if len({value for value, _ in found}) > 1:
            return Estimate(means[0], None, None, 1)
        return Estimate(means[0], measured(row, f"{figure.metric}_low"), measured(row, f"{figure.metric}_high"), 1)
    mean = Mean.of(means)
    low, high = (-math.inf, math.inf) if figure.scale is None else figure.scale
    return Estimate(mean.value, max(mean.low, low), min(mean.high, high), mean.count)


def pretrained_figure(runs: Sequence[Run], figure: Figure) -> Estimate | None:
    """The figure before training, of runs that began with the same (:func:`by_base`)."""
    return arm_figure(runs, figure, paper.PRETRAINED)


def headline_figures(runs: Sequence[Run]) -> list[Figure]:
    """The headline figures of all runs, each once."""
    return list({figure.name: figure for run in runs for figure in run.facts.benchmarks.headlines}.values())


def table_1(runs: Sequence[Run]) -> Table | None:
    """Pretrained model and arms, each benchmark beside the paper's; None where no run was evaluated."""
    if not any(run.points for run in runs):
        return None
    lines = []
    shown = headline_figures(runs)
    for base in by_base(runs):
        start = [pretrained_figure(base.runs, figure) for figure in shown]
        published: paper.SafetyRow | None = paper.TABLE_1["fedavg"][paper.PRETRAINED]
        lines.append([base.name, "", *_cells(base, shown, start, published)])
    for group in grouped(runs):
        ends = [arm_figure(group.runs, figure) for figure in shown]
        published = paper.paper_row(group.algorithm, group.method)
        lines.append([group.name, ", ".join(map(str, group.seeds)), *_cells(group, shown, ends, published)])
    head = ["arm", "seeds"]
    for figure in shown:
        head += [_heading(figure, runs), "paper"]
    return Table(head, lines)


def caption(runs: Sequence[Run]) -> str:
    """By what the table's figures were measured, and of what the paper's are."""
    rules = " / ".join(sorted({run.facts.advbench_rule for run in runs}))
    scorers = " / ".join(sorted({run.facts.hhh_scorer for run in runs}))
    counts = f"{paper.NUM_ADVBENCH}, {paper.NUM_HHH} and {paper.NUM_MT_BENCH} items"
    return (
        f"[low, high] = 95 % interval, over seeds where n is given. AdvBench by the rule {rules}, HHH by the scorer "
        f"{scorers}. The paper's figures ({paper.SOURCE}, Table 1) are of Llama-3.1-8B-Instruct on {counts}, HHH by "
        "the choice between (A) and (B), MT-Bench by GPT-4, without intervals; – = the paper did not run this method."
    )


def differences(groups: Sequence[Group]) -> Table | None:
    """The keys in which groups differ beside what their arms are, a column a group; None where there are none."""
    settings = [group.settings for group in groups]
    keys = differing_beside_arms([(group.runs[0].facts.arm, group.settings) for group in groups])
    if not keys:
        return None
    rows = [[key, *(shown_value(key, own, settings) for own in settings)] for key in keys]
    return Table(["key", *(group.name for group in groups)], rows, num_text=1 + len(groups))


def warnings(groups: Sequence[Group]) -> list[str]:
    """Runs of one group that are no independent draws, or come from different code."""
    lines = []
    for group in groups:
        for run, other in pairwise(group.runs):
            if run.facts.seed != other.facts.seed:
                continue
            head = f"{run.title} and {other.title} are {group.name} with seed {run.facts.seed}"
            if run.evaluations == other.evaluations:
                lines.append(f"{head} and have the same results: they count as one run.")
            else:
                lines.append(
                    f"{head}, but their results differ: their mean counts as one seed, without an interval of its own; "
                    "find out why, and leave one of them out."
                )
        by_commit: dict[str, list[str]] = {}
        for run in group.runs:
            by_commit.setdefault(commit_of(run.manifest), []).append(run.title)
        if len(by_commit) > 1:
            found = "; ".join(f"{commit}: {', '.join(titles)}" for commit, titles in by_commit.items())
            lines.append(f"{group.name}: its runs were made by different commits of fedsim ({found}).")
    runs = [run for group in groups for run in group.runs]
    return lines + [line for base in by_base(runs) for line in _unlike_beginnings(base)]


def _unlike_beginnings(base: Group) -> list[str]:
    """Runs of one seed that measured another figure on the same pretrained model."""
    lines, first = [], dict[int, tuple[Run, list[float | None]]]()
    for run in base.runs:
        row = run.points.get(paper.PRETRAINED)
        if row is None:
            continue
        found = [measured(row, figure.metric) for figure in headline_figures(base.runs)]
        other, expected = first.setdefault(run.facts.seed, (run, found))
        if found != expected:
            lines.append(
                f"{other.title} and {run.title} measured the same {base.name} model with seed {run.facts.seed}, but "
                "their figures of it differ: their mean counts as one seed."
            )
    return lines


def headlines(runs: Sequence[Run]) -> list[str]:
    """Each group of plain federated training beside the methods that differ from it in filter and CAI alone."""
    lines = []
    groups = grouped(runs)
    for plain in groups:
        if plain.method != paper.method_name(False, False):
            continue
        others = [group for group in groups if group is not plain and _differ_in_method(group, plain)]
        beginners = [run for run in runs if base_settings(run.settings) == base_settings(plain.settings)]
        for figure in headline_figures(runs):
            base, start = arm_figure(plain.runs, figure), pretrained_figure(beginners, figure)
            if base is None:
                continue
            words = []
            for group in others:
                other = arm_figure(group.runs, figure)
                if other is not None:
                    name = group.name.removeprefix(f"{paper.algorithm_name(group.algorithm)}, ")
                    words.append(f"{name} {figure.shown(other.value)}")
            before = "" if start is None else f" (pretrained {figure.shown(start.value)})"
            beside = f"; {', '.join(words)}" if words else ""
            algorithm, _, name = plain.name.partition(", ")
            lines.append(f"{figure.label}, {algorithm}: {name} {figure.shown(base.value)}{before}{beside}.")
    return lines


def _differ_in_method(one: Group, other: Group) -> bool:
    """Tell groups of one aggregation that differ in filter and CAI alone."""
    keys = differing([one.settings, other.settings])
    sections = [section for section in ARM_SECTIONS if section != "federation.algorithm"]
    return one.method != other.method and all(key.startswith(tuple(sections)) for key in keys)


def _cells(
    group: Group, shown: Sequence[Figure], found: Sequence[Estimate | None], published: paper.SafetyRow | None
) -> list[str]:
    """Measured and published value of each figure by turns."""
    cells = []
    for figure, estimate in zip(shown, found, strict=True):
        if estimate is not None:
            cells.append(estimate.shown(figure.digits))
        elif figure.name == "mt_bench" and group.runs[0].facts.unrated:
            cells.append(NOT_RATED)
        else:
            cells.append(NOT_MEASURED)
        cells.append("–" if published is None else published.shown(figure.name, absent="–"))
    return cells


def _heading(figure: Figure, runs: Sequence[Run]) -> str:
    shown = item_counts(runs, figure)
    return f"{figure.label} (n = {shown})" if shown else figure.label


def item_counts(runs: Sequence[Run], figure: Figure) -> str:
    """How many items a figure is over, such as ``130``; every number there was, ``120/130``, "" if none is known."""
    counts = {measured(row, figure.count_metric) for run in runs for row in run.points.values()}
    return "/".join(f"{count:,.0f}" for count in sorted(count for count in counts if count is not None))
