"""Arms of several runs: figures with intervals, over seeds where there are several.

Each is set beside the paper's Table 1.
"""

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
from fedsim.report.sections import counts_of
from fedsim.report.summary import NOT_RATED, heading

BASE_SECTIONS = (
    "model.path", "model.dtype", "model.attention", "model.max_context", "eval.", "judge.",
)  # fmt: skip
"""Beginnings of the keys that decide the pretrained model's figures."""

OTHER_POINTS = ("eval.every", "eval.guard_judge")
"""Keys under ``eval.`` that do not decide them."""


@dataclass(frozen=True)
class Estimate:
    """A figure of an arm and its 95 % interval.

    Attributes:
        value: in the figure's unit.
        low: lower end; None for a single score without spread.
        high: upper end, likewise.
        num_seeds: seeds that the figure is taken over.
    """

    value: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def reach(self) -> list[list[float]] | None:
        """Lengths of the error bars, ``[[down], [up]]``; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return [[max(self.value - self.low, 0.0)], [max(self.high - self.value, 0.0)]]

    def shown(self, digits: int) -> str:
        """Format as ``97.5 [95.8, 98.5]``, with the number of seeds where there are several."""
        text = f"{self.value:.{digits}f}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        if self.num_seeds > 1:
            text += f", n = {self.num_seeds}"
        return text


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed and place.

    Attributes:
        name: the arm, with the keys that distinguish it from the report's other groups of that arm.
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
    """Divide runs into groups of equal settings.

    Returns:
        Arms in the paper's order, groups of an arm by the values in which they differ.
    """
    # Groups, in the order in which they occur.
    found: list[list[Run]] = []
    for run in runs:
        for members in found:
            if members[0].settings == run.settings:
                members.append(run)
                break
        else:
            found.append([run])
    # Their order and names follow from the settings in which they differ.
    keys = differing([members[0].settings for members in found])
    found.sort(key=lambda members: (*_place(members[0]), order_of(members[0].settings, keys)))
    names = group_names([(members[0].facts.arm, members[0].settings) for members in found])
    groups = []
    for name, members in zip(names, found, strict=True):
        groups.append(Group(name, sorted(members, key=lambda run: run.facts.seed)))
    return groups


def _place(run: Run) -> tuple[str, bool, str]:
    """Return the sort key of an arm.

    The order is FL, FL + filter, FL + CAI, FL + filter + CAI of one aggregation after the other.
    """
    return run.facts.algorithm, "CAI" in run.facts.method, run.facts.method


def by_base(runs: Sequence[Run]) -> list[Group]:
    """Divide runs by their pretrained model and the benchmarks that measure it."""
    found: list[tuple[Settings, list[Run]]] = []
    for run in runs:
        own = base_settings(run.settings)
        for settings, members in found:
            if settings == own:
                members.append(run)
                break
        else:
            found.append((own, [run]))
    names = group_names([(paper.PRETRAINED, settings) for settings, _ in found])
    return [Group(name, members) for name, (_, members) in zip(names, found, strict=True)]


def base_settings(settings: Settings) -> Settings:
    """Select the settings that decide the pretrained model's figures."""
    found = {}
    for key, value in settings.items():
        if key.startswith(BASE_SECTIONS) and key not in OTHER_POINTS:
            found[key] = value
    return found


def arm_figure(runs: Sequence[Run], figure: Figure, point: str = "final") -> Estimate | None:
    """Estimate a figure at the end of training, or at ``point``.

    The interval of one seed is the run's own, that of several is Student's over the seeds. Runs of
    one seed share its draws and count once, as their mean.

    Args:
        runs: of one group.

    Returns:
        None where no run has the figure.
    """
    # Seed → value of each of its runs, with the row that holds it.
    by_seed: dict[int, list[tuple[float, Row]]] = {}
    for run in runs:
        row = run.points.get(point)
        if point == "final":
            row = run.final
        value = measured(row, figure.metric)
        if row is not None and value is not None:
            by_seed.setdefault(run.facts.seed, []).append((value, row))
    if not by_seed:
        return None
    # Mean of each seed, in the order in which the seeds occur.
    means = []
    for found in by_seed.values():
        values = [value for value, _ in found]
        means.append(math.fsum(values) / len(values))
    if len(means) == 1:
        (found,) = by_seed.values()
        if len({value for value, _ in found}) > 1:  # runs of one seed that disagree
            return Estimate(means[0], None, None, 1)
        row = found[0][1]
        low, high = measured(row, f"{figure.metric}_low"), measured(row, f"{figure.metric}_high")
        return Estimate(means[0], low, high, 1)
    # Student's interval over the seeds' means, cut at the ends of the figure's scale.
    least, greatest = figure.scale or (-math.inf, math.inf)
    mean = Mean.of(means)
    return Estimate(mean.value, max(mean.low, least), min(mean.high, greatest), mean.count)


def pretrained_figure(runs: Sequence[Run], figure: Figure) -> Estimate | None:
    """Estimate a figure before training.

    Args:
        runs: of one group of :func:`by_base`.
    """
    return arm_figure(runs, figure, paper.PRETRAINED)


def headline_figures(runs: Sequence[Run]) -> list[Figure]:
    """The headline figures of all runs, each once."""
    found: dict[str, Figure] = {}
    for run in runs:
        for figure in run.benchmarks.headlines:
            found[figure.name] = figure
    return list(found.values())


def table_1(runs: Sequence[Run]) -> Table | None:
    """Pretrained models and arms, each benchmark beside the paper's.

    Returns:
        None where no run was evaluated.
    """
    if not any(run.points for run in runs):
        return None
    shown = headline_figures(runs)
    lines = []
    # Pretrained models: the paper's one has the same row in both halves of its table.
    published: paper.SafetyRow | None = paper.TABLE_1["fedavg"][paper.PRETRAINED]
    for base in by_base(runs):
        before = [pretrained_figure(base.runs, figure) for figure in shown]
        lines.append([base.name, "", *_cells(base, shown, before, published)])
    # Arms.
    for group in grouped(runs):
        ends = [arm_figure(group.runs, figure) for figure in shown]
        published = paper.paper_row(group.algorithm, group.method)
        seeds = ", ".join(map(str, group.seeds))
        lines.append([group.name, seeds, *_cells(group, shown, ends, published)])
    head = ["arm", "seeds"]
    for figure in shown:
        head += [_heading(figure, runs), "paper"]
    return Table(head, lines)


def caption(runs: Sequence[Run]) -> str:
    """State the rules behind the table's figures, and the source of the paper's."""
    rules = " / ".join(sorted({run.facts.advbench_rule for run in runs}))
    scorers = " / ".join(sorted({run.facts.hhh_scorer for run in runs}))
    counts = f"{paper.NUM_ADVBENCH}, {paper.NUM_HHH} and {paper.NUM_MT_BENCH} items"
    return (
        f"[low, high] = 95 % interval, over seeds where n is given. AdvBench by the rule {rules}, "
        f"HHH by the scorer {scorers}. The paper's figures ({paper.SOURCE}, Table 1) are of "
        f"Llama-3.1-8B-Instruct on {counts}, HHH by the choice between (A) and (B), MT-Bench by "
        "GPT-4, without intervals; – = the paper did not run this method."
    )


def differences(groups: Sequence[Group]) -> Table | None:
    """The keys in which groups differ beyond what their arms account for, a column a group.

    Returns:
        None where there are none.
    """
    settings = [group.settings for group in groups]
    keys = differing_beside_arms([(group.runs[0].facts.arm, group.settings) for group in groups])
    if not keys:
        return None
    lines = []
    for key in keys:
        lines.append([key, *(shown_value(key, own, settings) for own in settings)])
    head = ["key", *(group.name for group in groups)]
    return Table(head, lines, num_text=1 + len(groups))


def warnings(groups: Sequence[Group]) -> list[str]:
    """Lines on runs that are no independent draws, come from different code, or disagree."""
    lines = []
    for group in groups:
        lines += _repetitions(group)  # of one seed
        lines += _other_commits(group)
    runs = [run for group in groups for run in group.runs]
    for base in by_base(runs):
        lines += _unlike_beginnings(base)
    return lines


def _repetitions(group: Group) -> list[str]:
    """Lines on runs of a group that have one seed."""
    lines = []
    for run, other in pairwise(group.runs):  # they are sorted by seed
        if run.facts.seed != other.facts.seed:
            continue
        head = f"{run.title} and {other.title} are {group.name} with seed {run.facts.seed}"
        if run.evaluations == other.evaluations:
            lines.append(f"{head} and have the same results: they count as one run.")
        else:
            lines.append(
                f"{head}, but their results differ: their mean counts as one seed, without an "
                "interval of its own; find out why, and leave one of them out."
            )
    return lines


def _other_commits(group: Group) -> list[str]:
    """A line on a group whose runs were made by different commits of fedsim."""
    by_commit: dict[str, list[str]] = {}
    for run in group.runs:
        by_commit.setdefault(commit_of(run.manifest), []).append(run.title)
    if len(by_commit) < 2:
        return []
    found = "; ".join(f"{commit}: {', '.join(titles)}" for commit, titles in by_commit.items())
    return [f"{group.name}: its runs were made by different commits of fedsim ({found})."]


def _unlike_beginnings(base: Group) -> list[str]:
    """Lines on runs of one seed whose figures of the same pretrained model differ."""
    shown = headline_figures(base.runs)
    lines = []
    # Seed → the first run of it, and its figures in the order of ``shown``.
    first: dict[int, tuple[Run, list[float | None]]] = {}
    for run in base.runs:
        row = run.points.get(paper.PRETRAINED)
        if row is None:
            continue
        found = [measured(row, figure.metric) for figure in shown]
        other, expected = first.setdefault(run.facts.seed, (run, found))
        if found != expected:
            lines.append(
                f"{other.title} and {run.title} measured the same {base.name} model with seed "
                f"{run.facts.seed}, but their figures of it differ: their mean counts as one seed."
            )
    return lines


def headlines(runs: Sequence[Run]) -> list[str]:
    """Sentences that set plain federated training beside the methods, a line a headline figure.

    Only groups that differ from it in filter and CAI and nothing else are named.
    """
    groups = grouped(runs)
    shown = headline_figures(runs)
    lines = []
    for plain in groups:
        if plain.method != paper.method_name(False, False):
            continue
        # Groups beside it, and the runs whose pretrained model is its own.
        others = [group for group in groups if _differ_in_method(group, plain)]
        own = base_settings(plain.settings)
        same_base = [run for run in runs if base_settings(run.settings) == own]
        for figure in shown:
            line = _headline(plain, others, same_base, figure)
            if line is not None:
                lines.append(line)
    return lines


def _headline(
    plain: Group,
    others: Sequence[Group],
    same_base: Sequence[Run],
    figure: Figure,
) -> str | None:
    """State one figure of plain training, before training and of other methods.

    Args:
        same_base: runs that began with the model of ``plain``.

    Returns:
        None where plain training was not measured.
    """
    end = arm_figure(plain.runs, figure)
    if end is None:
        return None
    algorithm, _, name = plain.name.partition(", ")
    line = f"{figure.label}, {algorithm}: {name} {figure.shown(end.value)}"
    before = pretrained_figure(same_base, figure)
    if before is not None:
        line += f" (pretrained {figure.shown(before.value)})"
    # The other methods.
    words = []
    for group in others:
        other = arm_figure(group.runs, figure)
        if other is not None:
            method = group.name.removeprefix(f"{paper.algorithm_name(group.algorithm)}, ")
            words.append(f"{method} {figure.shown(other.value)}")
    if words:
        line += f"; {', '.join(words)}"
    return f"{line}."


def _differ_in_method(one: Group, other: Group) -> bool:
    """Return True for groups of one aggregation that differ in filter and CAI and nothing else."""
    if one.method == other.method:
        return False
    sections = tuple(section for section in ARM_SECTIONS if section != "federation.algorithm")
    return all(key.startswith(sections) for key in differing([one.settings, other.settings]))


def _cells(
    group: Group,
    shown: Sequence[Figure],
    found: Sequence[Estimate | None],
    published: paper.SafetyRow | None,
) -> list[str]:
    """Measured and published value of each figure by turns.

    Args:
        found: the group's estimate of each of ``shown``.
        published: the paper's row; None for a method that it did not run.
    """
    # Two cells a figure.
    cells = []
    for figure, estimate in zip(shown, found, strict=True):
        if estimate is not None:
            cells.append(estimate.shown(figure.digits))
        elif figure.name == "mt_bench" and group.runs[0].facts.unrated:
            cells.append(NOT_RATED)
        else:
            cells.append(NOT_MEASURED)
        if published is None:
            cells.append("–")
        else:
            cells.append(published.shown(figure.name, absent="–"))
    return cells


def _heading(figure: Figure, runs: Sequence[Run]) -> str:
    return heading(figure, item_counts(runs, figure))


def item_counts(runs: Sequence[Run], figure: Figure) -> str:
    """Number of items that a figure is over (:func:`fedsim.report.sections.counts_of`)."""
    rows: list[Row] = []
    for run in runs:
        rows += run.points.values()
    return counts_of(rows, figure)
