"""The values of the report's page, each from the runs that have its data, and the page made of them.

The page itself is ``page.html.jinja``, beside this file.
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


#: Characters that HTML forbids, that show nothing, or that turn the direction of what follows.
UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


@dataclass(frozen=True)
class Shown:
    """A picture of the page: its data URI, its words for those who cannot see it, and its caption."""

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
        plotted = {figure.name: figure for run in self.runs for figure in run.facts.benchmarks.plotted}
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
        """Seconds against safety and helpfulness: the first headline share, and the first in another unit."""
        first: dict[bool, Figure] = {}
        for figure in headline_figures(self.runs):
            first.setdefault(figure.is_share, figure)
        found = []
        for figure in first.values():
            about = f"{self.arms}{items(self.runs, figure)}; bars: 95 % intervals."
            found += self._add(
                f"cost-{_file_name(figure)}",
                pictures.cost(self.runs, figure),
                f"One dot an arm: seconds to the right, {figure.label} upwards. {in_words(self.runs, figure)}",
                f"Mean seconds of a run against {figure.label}, {about}",
            )
        return found

    def losses(self) -> list[Shown]:
        """Loss by client, a picture a run."""
        found = []
        for i, run in enumerate(self.runs, 1):
            words = f"{run.title}: loss of each client that trained, over {run.facts.num_rounds} rounds."
            found += self._add(f"loss-{i}", pictures.client_losses(run), losses_in_words(run), words)
        return found

    def times(self) -> list[Shown]:
        """Seconds by phase, a picture a run."""
        found = []
        for i, run in enumerate(self.runs, 1):
            words = f"{run.title}: seconds by phase, {duration(run.facts.total_s)} in all."
            found += self._add(f"time-{i}", plot_times(run.rows, run.title), times_in_words(run), words)
        return found

    def idle(self) -> list[Shown]:
        """Idle share of all runs."""
        words = f"Share of the processes' time without work while clients train, {self.num}."
        return self._add("idle", pictures.idle(self.runs), idle_in_words(self.runs), words)

    def _add(self, name: str, drawn: Picture | None, alt: str, caption: str) -> list[Shown]:
        """The picture, if there was something to draw."""
        if drawn is None:
            return []
        content = pictures.png(drawn)
        self.files[f"{name}.png"] = content
        return [Shown(f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}", alt, caption)]


def _file_name(figure: Figure) -> str:
    """The beginning of a picture's file name."""
    return figure.name.replace("_", "-")


def report(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """The page and its pictures by file name."""
    shown, groups = Pictures(runs), grouped(runs)
    notes = dict.fromkeys(warnings(groups))
    for run in runs:
        notes.update(dict.fromkeys([*caveats(run.facts), *run.facts.notes]))
    values = {
        "title": f"fedsim: {runs[0].facts.name if len(runs) == 1 else shown.num}",
        "headlines": headlines(runs) if len(groups) > 1 else [headline(run) for run in runs],
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
    """The page of :func:`report`'s values, all of them escaped."""
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
    """A text whose characters that cannot be shown are U+FFFD; markup that the template made stays as it is."""
    return value if hasattr(value, "__html__") else UNSHOWN.sub("\ufffd", str(value))


def of_run(run: Run) -> dict[str, Any]:
    """The page's values of one run."""
    manifest = {name: _without_places(value) for name, value in run.manifest.items() if name != "config"}
    return {
        "title": run.title,
        "controls": [*cai_lines(run.rows), *controls(run.rows, run.facts.benchmarks)],
        "guard": guard(run),
        "samples": samples(run),
        "num_categories": len(run.samples),
        "manifest": json.dumps(manifest, indent=1, ensure_ascii=False),
    }


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


def guard(run: Run) -> Table | None:
    """Confusion matrix in counts and rates, a line for each guard that was measured; None without one."""
    lines = []
    for row in run.rows:
        names = ("num_caught", "num_missed", "num_false_alarms", "num_passed")
        caught, missed, alarms, passed = (measured(row, f"guard/{name}") for name in names)
        if caught is None or missed is None or alarms is None or passed is None:
            continue
        red, acceptable = caught + missed, alarms + passed
        cells = []
        for count, of in ((caught, red), (missed, red), (alarms, acceptable), (passed, acceptable)):
            cells.append(f"{count:,.0f}" + (f" ({100 * count / of:.1f} %)" if of else ""))
        lines.append([str(row.get("point", "this run")), *cells])
    head = ["guard", "red, called unsafe", "red, passed", "acceptable, called unsafe", "acceptable, passed"]
    return Table(head, lines) if lines else None


def samples(run: Run) -> Table | None:
    """Answers to the fictional world's harmless questions, a column a point; None without any."""
    points = list(dict.fromkeys(point for sample in run.samples for point in sample.answers))
    lines = []
    for sample in run.samples:
        for turn in (0, 1):
            answers = [sample.answers.get(point, ("", ""))[turn] for point in points]
            lines.append([f"{sample.category}: {sample.turns[turn]}", *answers])
    return Table(["prompt", *(POINT_TITLES[point] for point in points)], lines) if lines else None


def together(groups: Sequence[Group]) -> Table | None:
    """The runs behind each line and dot; None for one run."""
    if sum(len(group.runs) for group in groups) < 2:
        return None
    lines = []
    for group in groups:
        commits = dict.fromkeys(commit_of(run.manifest) for run in group.runs)
        titles = [f"{run.title} (seed {run.facts.seed})" for run in group.runs]
        lines.append([group.name, ", ".join(titles), ", ".join(commits)])
    return Table(["arm", "runs", "fedsim's commit"], lines, num_text=3)


def _without_places(value: Any) -> Any:
    """A manifest's value with absolute paths cut to their last part: a page may leave the machine."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return PATH.sub(lambda match: match[1], value) if isinstance(value, str) else value
