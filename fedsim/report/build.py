"""The report's sections, each from the runs that have its data, put together as one page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedsim.base.figures import Figure
from fedsim.base.tables import Table, duration, measured, with_interval
from fedsim.base.version import commit_of
from fedsim.report import html, pictures
from fedsim.report.arms import Group, caption, differences, grouped, headline_figures, headlines, table_1, warnings
from fedsim.report.cai_line import cai_lines
from fedsim.report.plots import plot_times
from fedsim.report.runs import Run
from fedsim.report.sections import POINT_TITLES
from fedsim.report.summary import caveats, controls
from fedsim.report.words import idle_in_words, in_words, items, losses_in_words, times_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

PATH = re.compile(r"""(?<![^\s"'=,(\[])(?:/[^/\s"']+)*/([^/\s"',)\]]+)/?""")
"""An absolute path, at the beginning of a word or a value; the group is its last part."""


class Pictures:
    """The page's pictures, each made once: its file, and the figure in the page.

    Attributes:
        files: content by file name.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.num = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        self.arms = f"{len(grouped(runs))} arm(s), {self.num}"
        self.files: dict[str, bytes] = {}

    def compared(self) -> list[str]:
        """Every headline figure and control by round and by arm."""
        found = []
        for figure in self._plotted():
            about = f"{self.arms}{items(self.runs, figure)}; bars: 95 % intervals."
            at_the_end = f"At the end, {in_words(self.runs, figure)}"
            found.append(
                self._add(
                    f"{_file_name(figure)}-rounds",
                    pictures.overlay(self.runs, figure),
                    f"Lines over rounds: {figure.label}. {at_the_end}",
                    f"{figure.label}, by round, {about}",
                )
            )
            found.append(
                self._add(
                    f"{_file_name(figure)}-arms",
                    pictures.dots(self.runs, figure),
                    f"One dot an arm: {figure.label}. {at_the_end}",
                    f"{figure.label}, before CAI and at the end, {about}",
                )
            )
        return found

    def costs(self) -> list[str]:
        """Seconds against safety and helpfulness: the first headline share, and the first in another unit."""
        first: dict[bool, Figure] = {}
        for figure in headline_figures(self.runs):
            first.setdefault(figure.is_share, figure)
        return [
            self._add(
                f"cost-{_file_name(figure)}",
                pictures.cost(self.runs, figure),
                f"One dot an arm: seconds to the right, {figure.label} upwards. {in_words(self.runs, figure)}",
                f"Mean seconds of a run against {figure.label}, {self.arms}{items(self.runs, figure)}; "
                "bars: 95 % intervals.",
            )
            for figure in first.values()
        ]

    def _plotted(self) -> list[Figure]:
        return list({figure.name: figure for run in self.runs for figure in run.facts.benchmarks.plotted}.values())

    def losses(self) -> list[str]:
        """Loss by client, a picture a run."""
        return [
            self._add(
                f"loss-{i}",
                pictures.client_losses(run),
                losses_in_words(run),
                f"{run.title}: loss of each client that trained, over {run.facts.num_rounds} rounds.",
            )
            for i, run in enumerate(self.runs, 1)
        ]

    def times(self) -> list[str]:
        """Seconds by phase, a picture a run."""
        return [
            self._add(
                f"time-{i}",
                plot_times(run.rows, run.title),
                times_in_words(run),
                f"{run.title}: seconds by phase, {duration(run.facts.total_s)} in all.",
            )
            for i, run in enumerate(self.runs, 1)
        ]

    def idle(self) -> list[str]:
        """Idle share of all runs."""
        words = f"Share of the processes' time without work while clients train, {self.num}."
        return [self._add("idle", pictures.idle(self.runs), idle_in_words(self.runs), words)]

    def _add(self, name: str, drawn: Picture | None, alt: str, caption: str) -> str:
        if drawn is None:
            return ""
        self.files[f"{name}.png"] = pictures.png(drawn)
        return html.figure(self.files[f"{name}.png"], alt, caption)


def _file_name(figure: Figure) -> str:
    """The beginning of a picture's file name."""
    return figure.name.replace("_", "-")


def report(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """The page and its pictures by file name."""
    shown, groups = Pictures(runs), grouped(runs)
    notes = dict.fromkeys(warnings(groups))
    for run in runs:
        notes.update(dict.fromkeys([*caveats(run.facts), *run.facts.notes]))
    parts = [
        html.bullets(headlines(runs) if len(groups) > 1 else [headline(run) for run in runs]),
        html.section("What these figures can and cannot show", [html.bullets(list(notes))]),
        html.section("Beside the paper's Table 1", [_paper(runs)]),
        html.section("Runs put together", [_together(groups)]),
        html.section("Safety and helpfulness by round", [*shown.compared(), *(_controls(run) for run in runs)]),
        html.section("Loss by client", shown.losses()),
        html.section("Guard", [guard(run) for run in runs]),
        html.section("Time by phase", shown.times()),
        html.section("Idle share", shown.idle()),
        html.section("Cost against safety", shown.costs()),
        html.section("Sample answers", [samples(run) for run in runs]),
        html.section("Manifests", [manifest(run) for run in runs]),
    ]
    return html.page(f"fedsim: {runs[0].facts.name if len(runs) == 1 else shown.num}", parts), shown.files


def headline(run: Run) -> str:
    """The run's benchmarks at its points, in a sentence."""
    found = []
    for figure in run.facts.benchmarks.headlines:
        values = [
            f"{POINT_TITLES[point]} {with_interval(row, figure.metric, figure.digits)}"
            for point, row in run.points.items()
            if measured(row, figure.metric) is not None
        ]
        if values:
            found.append(f"{figure.label} {', '.join(values)}")
    facts = run.facts
    return (
        f"{run.title} ({facts.arm}, seed {facts.seed}, {duration(facts.total_s)}): "
        f"{'; '.join(found) or 'not evaluated'}."
    )


def guard(run: Run) -> str:
    """Confusion matrix in counts and rates, a line for each guard that was measured."""
    lines = []
    for row in run.rows:
        names = ("num_caught", "num_missed", "num_false_alarms", "num_passed")
        caught, missed, alarms, passed = (measured(row, f"guard/{name}") for name in names)
        if caught is None or missed is None or alarms is None or passed is None:
            continue
        cells = [f"{n:,.0f}" + (f" ({100 * n / of:.1f} %)" if of else "")
                 for n, of in ((caught, caught + missed), (missed, caught + missed),
                               (alarms, alarms + passed), (passed, alarms + passed))]  # fmt: skip
        lines.append([str(row.get("point", "this run")), *cells])
    if not lines:
        return ""
    head = ["guard", "red, called unsafe", "red, passed", "acceptable, called unsafe", "acceptable, passed"]
    return f"<h3>{html.text(run.title)}</h3>{html.table(Table(head, lines))}"


def samples(run: Run) -> str:
    """Answers to the fictional world's harmless questions, side by side."""
    if not run.samples:
        return ""
    points = list(dict.fromkeys(point for sample in run.samples for point in sample.answers))
    lines = [
        [
            f"{sample.category}: {sample.turns[turn]}",
            *(sample.answers.get(p, ("", ""))[turn] for p in points),
        ]
        for sample in run.samples
        for turn in (0, 1)
    ]
    content = html.table(Table(["prompt", *(POINT_TITLES[p] for p in points)], lines), texts=True)
    return html.details(f"{run.title}: the first question of each of {len(run.samples)} categories", content)


def manifest(run: Run) -> str:
    """Versions, hardware, hashes, seed, commit and command as the run recorded them."""
    shown = {name: _without_places(value) for name, value in run.manifest.items() if name != "config"}
    return html.details(run.title, f"<pre>{html.text(json.dumps(shown, indent=1, ensure_ascii=False))}</pre>")


def _without_places(value: Any) -> Any:
    """A manifest's value with absolute paths cut to their last part: a page may leave the machine."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return PATH.sub(lambda match: match[1], value) if isinstance(value, str) else value


def _controls(run: Run) -> str:
    """What there was for CAI to do, and the controls of the headline figures."""
    lines = [*cai_lines(run.rows), *controls(run.rows, run.facts.benchmarks)]
    return f"<h3>{html.text(run.title)}</h3>{html.bullets(lines)}" if lines else ""


def _paper(runs: Sequence[Run]) -> str:
    """Table 1 of these runs."""
    content = table_1(runs)
    return "" if content is None else html.table(content) + html.paragraph(caption(runs), note=True)


def _together(groups: Sequence[Group]) -> str:
    """The runs of each line and dot, and the keys in which the groups differ beside their arms."""
    if sum(len(group.runs) for group in groups) < 2:
        return ""
    lines = []
    for group in groups:
        commits = dict.fromkeys(commit_of(run.manifest) for run in group.runs)
        titles = [f"{run.title} (seed {run.facts.seed})" for run in group.runs]
        lines.append([group.name, ", ".join(titles), ", ".join(commits)])
    parts = [html.table(Table(["arm", "runs", "fedsim's commit"], lines, num_text=3))]
    unlike = differences(groups)
    if unlike is not None:
        words = (
            "Beside their arms, the groups differ in these keys; a difference between two of them may be due to any."
        )
        parts += [html.paragraph(words), html.table(unlike)]
    return "".join(parts)
