"""Descriptions of benchmarks and their figures: the source of tables, plots, reports and studies.

A run keeps them in ``benchmarks.json``, so that a finished run is read without loading the code of
its benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fedsim.base.errors import DataError
from fedsim.base.json_text import parse_json

FILE: Final = "benchmarks.json"
"""File of a run directory that holds the descriptions."""

PERCENT: Final = (0.0, 100.0)
"""Scale of a share in percent."""

Line = Literal["", "always", "unless 0"]
"""Condition under which a figure has a line of its own in the summary."""


@dataclass(frozen=True)
class Figure:
    """A figure that a benchmark measures.

    It also covers its variants: metrics whose name begins with its name and "_", such as one a
    category, and that no other figure names.

    Attributes:
        name: its metric's name in ``metrics.jsonl``, without ``eval/``.
        title: for people, without a unit: "Benchmark: what is measured".
        unit: "%" for a share, whose values by item are 0 to 1; else what it counts in, such as
            "points"; "" for a number of things.
        digits: shown behind the decimal point.
        scale: least and greatest value, where intervals and plots end; None where a side is open.
        headline: the benchmark's main figure: a column of the tables, and a plot.
        control: name of the headline figure that it is the control of: it is plotted beside that,
            and subtracted in studies.
        count: metric, without ``eval/``, that says how many items it is taken over; "" =
            ``<name>_count``.
        line: when the summary has a line for it.
        note: a sentence that is printed below it.
    """

    name: str
    title: str
    unit: str = "%"
    digits: int = 1
    scale: tuple[float, float] | None = PERCENT
    headline: bool = False
    control: str = ""
    count: str = ""
    line: Line = ""
    note: str = ""

    @property
    def metric(self) -> str:
        """Its name in the metric rows."""
        return f"eval/{self.name}"

    @property
    def count_metric(self) -> str:
        """Name of its count in the metric rows."""
        return f"eval/{self.count or f'{self.name}_count'}"

    @property
    def is_share(self) -> bool:
        """True for a share in percent."""
        return self.unit == "%"

    @property
    def factor(self) -> float:
        """From the mean of its values by item to the figure."""
        return 100.0 if self.is_share else 1.0

    @property
    def short(self) -> str:
        """The benchmark's part of the title."""
        return self.title.partition(":")[0]

    @property
    def unit_words(self) -> str:
        """``%``, the ends of a scale such as ``1–10``, or the unit."""
        if self.is_share or self.scale is None:
            return self.unit
        return f"{self.scale[0]:g}–{self.scale[1]:g}"

    @property
    def label(self) -> str:
        """Title and unit, such as ``HHH: right choices, %``."""
        return f"{self.title}, {self.unit_words}" if self.unit_words else self.title

    def shown(self, value: float, sign: str = "") -> str:
        """A value in its digits."""
        return f"{value:{sign}.{self.digits}f}"


@dataclass(frozen=True)
class Source:
    """One public file or model.

    Attributes:
        key: the configuration key that takes it.
        name: what it is called.
        place: where it is published; a repository and the path in it.
        licence: its licence.
        rows: data rows of the tested file, in words; empty where none was tested.
        file: its name.
        sha256: of the tested file; empty where none was tested.
    """

    key: str
    name: str
    place: str
    licence: str
    rows: str = ""
    file: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Description:
    """A benchmark as a run describes it.

    Attributes:
        name: as in the configuration (``eval.<name>``) and in the manifest's inputs.
        title: for people.
        figures: all that it can measure.
        published: SHA-256 of its published file; "" if none is known.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    published: str = ""


@dataclass(frozen=True)
class Benchmarks:
    """The benchmarks of a run, or the built-in ones.

    Attributes:
        described: in the order in which they are shown.
    """

    described: tuple[Description, ...] = ()
    _by_name: dict[str, Figure] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for figure in self.figures:
            assert figure.name not in self._by_name, f"two figures are named {figure.name}"
            self._by_name[figure.name] = figure

    def __iter__(self) -> Iterator[Description]:
        return iter(self.described)

    @property
    def figures(self) -> list[Figure]:
        """All figures, in order."""
        found: list[Figure] = []
        for described in self.described:
            found += described.figures
        return found

    @property
    def headlines(self) -> list[Figure]:
        """Columns of the headline tables."""
        return [figure for figure in self.figures if figure.headline]

    @property
    def plotted(self) -> list[Figure]:
        """Headline figures, each with its controls behind it."""
        found = []
        for figure in self.headlines:
            found.append(figure)
            found += self.controls(figure.name)
        return found

    def controls(self, name: str) -> list[Figure]:
        """The controls of a headline figure."""
        return [figure for figure in self.figures if figure.control == name]

    def lines(self, when: Line) -> list[Figure]:
        """Figures that have a line of their own in the summary."""
        return [figure for figure in self.figures if figure.line == when]

    def of(self, name: str) -> Figure | None:
        """Return the figure that a metric belongs to, itself or as a variant; None without one.

        Args:
            name: of the metric, without ``eval/``. Of several figures the longest name counts.
        """
        return figure_of(name, self._by_name)


def figure_of(name: str, known: Mapping[str, Figure]) -> Figure | None:
    """Return the figure with the longest name that ``name`` equals, or continues behind a "_"."""
    # Cut the name at its last "_" until what is left is known.
    while name:
        if name in known:
            return known[name]
        name = name.rpartition("_")[0]
    return None


def collapse_figures(name: str, title: str) -> tuple[Figure, ...]:
    """Signs of collapse in texts, as :func:`fedsim.evaluate.measures.collapse_metrics` names them.

    Args:
        name: beginning of their names.
        title: of the texts.
    """
    count = f"{name}_num_texts"
    return (
        Figure(count, f"{title}: texts", "", 0, None),
        Figure(f"{name}_distinct_2", f"{title}: different word pairs among all"),
        Figure(f"{name}_repeated_suffix", f"{title}: texts that end in a loop", count=count),
        Figure(f"{name}_mean_words", f"{title}: mean length", "words", 1, None),
        Figure(f"{name}_empty_share", f"{title}: texts without any letter", count=count),
    )


def reply_figures(name: str, title: str) -> tuple[Figure, ...]:
    """Figures of every benchmark's replies (:func:`fedsim.evaluate.measures.reply_metrics`)."""
    count = f"{name}_num_texts"
    return (
        Figure(
            f"{name}_truncated",
            f"{title} replies truncated",
            "",
            0,
            None,
            count=count,
            line="always",
        ),
        Figure(f"{name}_prompts_truncated", f"{title} prompts truncated", "", 0, None),
        Figure(f"{name}_empty", f"{title} replies without text", "", 0, None),
        Figure(f"{name}_mean_tokens", f"{title}: mean length of a reply", "tokens", 1, None),
        *collapse_figures(name, title),
    )


def write_benchmarks(folder: Path, benchmarks: Benchmarks) -> None:
    """Write the descriptions into a run directory, or replace them."""
    content = [asdict(described) for described in benchmarks]
    # Written beside the file and renamed, so that a reader sees the old or the new one whole.
    new = folder / f".{FILE}.new"
    new.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / FILE)


def read_benchmarks(folder: Path) -> Benchmarks | None:
    """The descriptions in a run directory; None if it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return Benchmarks(tuple(_described(entry) for entry in content))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise DataError(f"{path}: is damaged; restore it") from error


def _described(entry: dict[str, Any]) -> Description:
    figures = []
    for figure in entry["figures"]:
        scale = figure["scale"]
        if scale is not None:  # JSON has lists in place of tuples
            scale = (float(scale[0]), float(scale[1]))
        figures.append(Figure(**{**figure, "scale": scale}))
    name, title = str(entry["name"]), str(entry["title"])
    return Description(name, title, tuple(figures), str(entry["published"]))


def name_given_twice(described: Iterable[Description]) -> str | None:
    """The first name of a benchmark or figure that occurs twice; None where all differ."""
    # Benchmarks and figures are named apart: a figure may have its benchmark's name.
    seen: set[str] = set()
    for benchmark in described:
        names = [
            f"benchmark {benchmark.name}",
            *(f"figure {figure.name}" for figure in benchmark.figures),
        ]
        for name in names:
            if name in seen:
                return name
            seen.add(name)
    return None
