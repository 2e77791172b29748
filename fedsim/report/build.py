"""Values of the report's page, each from the runs that have its data, and the page itself.

Its template is ``page.html.jinja``, beside this file.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedsim.base.figures import Figure
from fedsim.base.tables import Table, duration, measured, with_interval
from fedsim.base.version import commit_of
from fedsim.report import pictures
from fedsim.report.arms import (
    Group,
    caption,
    differences,
    grouped,
    headline_figures,
    headlines,
    table_1,
    warnings,
)
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

#: Characters that HTML forbids, that show nothing, or that turn the direction of what follows.
UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"
    r"\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A picture of the page.

    Attributes:
        source: its data URI.
        alt: its content in words, for readers who cannot see it.
        caption: printed below it.
    """

    source: str
    alt: str
    caption: str


class Pictures:
    """The page's pictures, each made once.

    Attributes:
        files: content of the PNG files by file name.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.num = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        self.arms = f"{len(grouped(runs))} arm(s), {self.num}"
        self.files: dict[str, bytes] = {}

    def compared(self) -> list[Shown]:
        """Every headline figure and control by round and by arm."""
        # Figures by name, each once: runs may have other benchmarks.
        plotted: dict[str, Figure] = {}
        for run in self.runs:
            for figure in run.benchmarks.plotted:
                plotted[figure.name] = figure
        found = []
        for figure in plotted.values():
            about = f"{self.arms}{items(self.runs, figure)}; bars: 95 % intervals."
            at_the_end = f"At the end, {in_words(self.runs, figure)}"
            found += self._add(
                f"{_file_name(figure)}-rounds",
                pictures.overlay(self.runs, figure),
                f"Lines over rounds: {figure.label}. {at_the_end}",
                f"{figure.label}, by round, {about}",
            )
            found += self._add(
                f"{_file_name(figure)}-arms",
                pictures.dots(self.runs, figure),
                f"One dot an arm: {figure.label}. {at_the_end}",
                f"{figure.label}, before CAI and at the end, {about}",
            )
        return found

    def costs(self) -> list[Shown]:
        """Seconds against safety and helpfulness, by one figure each.

        They are the first headline share, and the first headline figure in another unit.
        """
        # True: a share in percent; False: another unit, such as a judge's points.
        first: dict[bool, Figure] = {}
        for figure in headline_figures(self.runs):
            first.setdefault(figure.is_share, figure)
        found = []
        for figure in first.values():
            about = f"{self.arms}{items(self.runs, figure)}; bars: 95 % intervals."
            axes = f"seconds to the right, {figure.label} upwards"
            found += self._add(
                f"cost-{_file_name(figure)}",
                pictures.cost(self.runs, figure),
                f"One dot an arm: {axes}. {in_words(self.runs, figure)}",
                f"Mean seconds of a run against {figure.label}, {about}",
            )
        return found

    def losses(self) -> list[Shown]:
        """Loss by client, a picture a run."""
        found = []
        for i, run in enumerate(self.runs, 1):
            rounds = f"over {run.facts.num_rounds} rounds"
            words = f"{run.title}: loss of each client that trained, {rounds}."
            picture = pictures.client_losses(run)
            found += self._add(f"loss-{i}", picture, losses_in_words(run), words)
        return found

    def times(self) -> list[Shown]:
        """Seconds by phase, a picture a run."""
        found = []
        for i, run in enumerate(self.runs, 1):
            words = f"{run.title}: seconds by phase, {duration(run.total_s)} in all."
            picture = plot_times(run.rows, run.title)
            found += self._add(f"time-{i}", picture, times_in_words(run), words)
        return found

    def idle(self) -> list[Shown]:
        """Idle share of all runs."""
        words = f"Share of the processes' time without work while clients train, {self.num}."
        return self._add("idle", pictures.idle(self.runs), idle_in_words(self.runs), words)

    def _add(self, name: str, drawn: Picture | None, alt: str, caption: str) -> list[Shown]:
        """Add a picture to the files.

        Args:
            name: of its file, without the ending.
            drawn: None if there was nothing to draw.

        Returns:
            The picture; none if there was nothing to draw.
        """
        if drawn is None:
            return []
        content = pictures.png(drawn)
        self.files[f"{name}.png"] = content
        text = base64.b64encode(content).decode("ascii")
        return [Shown(f"data:image/png;base64,{text}", alt, caption)]


def _file_name(figure: Figure) -> str:
    """Return the beginning of a picture's file name."""
    return figure.name.replace("_", "-")


def report(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """Return the page (HTML) and its pictures (PNG) by file name."""
    shown, groups = Pictures(runs), grouped(runs)
    notes = dict.fromkeys(warnings(groups))  # each once, in their order
    for run in runs:
        notes.update(dict.fromkeys([*caveats(run.facts), *run.facts.notes]))
    about = shown.num
    if len(runs) == 1:
        about = runs[0].facts.name
    # One arm has nothing to be set beside: its runs are stated one by one.
    sentences = headlines(runs)
    if len(groups) == 1:
        sentences = [headline(run) for run in runs]
    values = {
        "title": f"fedsim: {about}",
        "headlines": sentences,
        "notes": list(notes),
        "paper": table_1(runs),
        "paper_caption": caption(runs),
        "together": together(groups),
        "unlike": differences(groups),
        "compared": shown.compared(),
        "losses": shown.losses(),
        "times": shown.times(),
        "idle": shown.idle(),
        "costs": shown.costs(),
        "runs": [of_run(run) for run in runs],
    }
    return render(values), shown.files


def render(values: Mapping[str, Any]) -> str:
    """Fill the template with :func:`report`'s values, all of them escaped."""
    return _template().render(values)


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_showable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja")


def _showable(value: Any) -> Any:
    """Replace characters that cannot be shown by U+FFFD; the template's own markup is kept."""
    if hasattr(value, "__html__"):
        return value
    return UNSHOWN.sub("\ufffd", str(value))


def of_run(run: Run) -> dict[str, Any]:
    """The page's values of one run."""
    kept = {name: value for name, value in run.manifest.items() if name != "config"}
    return {
        "title": run.title,
        "controls": [*cai_lines(run.rows), *controls(run.rows, run.benchmarks)],
        "guard": guard(run),
        "samples": samples(run),
        "num_categories": len(run.samples),
        "manifest": json.dumps(_without_places(kept), indent=1, ensure_ascii=False),
    }


def headline(run: Run) -> str:
    """State the run's headline figures at its evaluation points in a sentence."""
    found = []
    for figure in run.benchmarks.headlines:
        values = []
        for point, row in run.points.items():
            if measured(row, figure.metric) is not None:
                value = with_interval(row, figure.metric, figure.digits)
                values.append(f"{POINT_TITLES[point]} {value}")
        if values:
            found.append(f"{figure.label} {', '.join(values)}")
    words = "; ".join(found) or "not evaluated"
    about = f"{run.facts.arm}, seed {run.facts.seed}, {duration(run.total_s)}"
    return f"{run.title} ({about}): {words}."


def guard(run: Run) -> Table | None:
    """Confusion matrix in counts and rates, a line for each guard that was measured.

    Returns:
        None without one.
    """
    head = ["guard", "red, called unsafe", "red, passed"]
    head += ["acceptable, called unsafe", "acceptable, passed"]
    lines = []
    for row in run.rows:
        caught, missed = measured(row, "guard/num_caught"), measured(row, "guard/num_missed")
        alarms, passed = measured(row, "guard/num_false_alarms"), measured(row, "guard/num_passed")
        if caught is None or missed is None or alarms is None or passed is None:
            continue
        cells = [str(row.get("point", "this run"))]
        for counts in ((caught, missed), (alarms, passed)):  # red rows, acceptable rows
            total = sum(counts)
            for count in counts:
                rate = f" ({100 * count / total:.1f} %)" if total else ""
                cells.append(f"{count:,.0f}{rate}")
        lines.append(cells)
    if not lines:
        return None
    return Table(head, lines)


def samples(run: Run) -> Table | None:
    """Answers to the embedded world's harmless questions, a column an evaluation point.

    Returns:
        None without any.
    """
    # Evaluation points, each once, in their order.
    points: dict[str, None] = {}
    for sample in run.samples:
        points.update(dict.fromkeys(sample.answers))
    # A line for each turn of each question.
    lines = []
    for sample in run.samples:
        for turn in (0, 1):
            answers = [sample.answers.get(point, ("", ""))[turn] for point in points]
            lines.append([f"{sample.category}: {sample.turns[turn]}", *answers])
    if not lines:
        return None
    return Table(["prompt", *(POINT_TITLES[point] for point in points)], lines)


def together(groups: Sequence[Group]) -> Table | None:
    """Table of the runs behind each line and dot; None for one run."""
    if sum(len(group.runs) for group in groups) < 2:
        return None
    lines = []
    for group in groups:
        commits = dict.fromkeys(commit_of(run.manifest) for run in group.runs)
        titles = [f"{run.title} (seed {run.facts.seed})" for run in group.runs]
        lines.append([group.name, ", ".join(titles), ", ".join(commits)])
    return Table(["arm", "runs", "fedsim's commit"], lines, num_text=3)


def _without_places(value: Any) -> Any:
    """Cut the absolute paths of a manifest's value to their last part: a page may be passed on."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str):
        return PATH.sub(lambda match: match[1], value)
    return value
