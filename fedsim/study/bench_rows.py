"""Rows of the benchmark, and the JSON file of a stage's rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

LARGE: Final = "Llama-3.1-8B"
"""Name of the model that GPUs are timed with."""

FAST: Final = "fedsim, fast sums (configs/paper)"
"""Name of the row of a step, or CAI iteration, as configs/paper runs it."""


@dataclass(frozen=True)
class Percentiles:
    """Seconds of one call: 20th, 50th and 80th percentile of the repeats."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Correctness:
    """Distance of a result from its reference.

    Attributes:
        what: what is compared with what, and how.
        error: the distance; NaN fails.
        limit: the largest distance that passes.
        part: what of the stage is not timed if it fails; "" for all of it.
    """

    what: str
    error: float
    limit: float
    part: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is within the limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Target:
    """A bound that a row's figure should reach.

    Attributes:
        figure: "ratio", "p50_s", or a name in the row's ``figures``.
        value: the bound, in the figure's unit.
        at_most: the figure should stay below the bound, not above.
    """

    figure: str
    value: float
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: a piece of work, how long it takes here and at its peer.

    Attributes:
        stage: name of the stage.
        name: what was done, in a few words.
        dtype: of the model's weights, such as "float32".
        shapes: sizes of the work, by name.
        seconds: of one call of ours; None for a row that only has figures.
        repeats: calls that were timed.
        setup_s: seconds before the first call that the timings leave out.
        peer: what ours is compared with, and its settings; None without a peer.
        peer_seconds: the same percentiles; None where the peer could not be timed.
        peer_absent: why not: "not installed", "no room on the GPU".
        peer_setup_s: the peer's seconds before its first call.
        ratio: peer's p50 / ours p50, of calls that took turns.
        figures: other results, such as {"rows_per_min": 12000.0}.
        target: what is asked of the row.
        floor_s: seconds that the device's peak allows for the work.
        floor: the floor's formula in words.
        note: what a reader must know beside it.
    """

    stage: str
    name: str
    dtype: str
    shapes: Mapping[str, Any]
    seconds: Percentiles | None = None
    repeats: int = 0
    setup_s: float | None = None
    peer: str | None = None
    peer_seconds: Percentiles | None = None
    peer_absent: str = ""
    peer_setup_s: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    target: Target | None = None
    floor_s: float | None = None
    floor: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Peer's p50 ÷ ours; None where one of them was not timed."""
        if self.seconds is None or self.peer_seconds is None:
            return None
        return self.peer_seconds.p50 / self.seconds.p50

    @property
    def fraction_of_floor(self) -> float | None:
        """Floor / p50: 1 is as fast as the device can."""
        if self.seconds is None or self.floor_s is None:
            return None
        return self.floor_s / self.seconds.p50

    def figure(self, name: str) -> float | None:
        """A figure that a target can name; None if it was not measured."""
        if name == "ratio":
            return self.ratio
        if name == "p50_s":
            return None if self.seconds is None else self.seconds.p50
        return self.figures.get(name)

    @property
    def reached(self) -> bool | None:
        """Return whether the target is met; None without a target or without its figure."""
        if self.target is None:
            return None
        value = self.figure(self.target.figure)
        if value is None or math.isnan(value):
            return None
        if self.target.at_most:
            return value <= self.target.value
        return value >= self.target.value


@dataclass(frozen=True)
class StageResult:
    """Content of a stage's file.

    Attributes:
        stage: its name.
        facts: where and with what it was measured: device, threads, versions, commit, date, peak.
        correctness: the checks that came before the timings.
        rows: the timings; empty if a check failed.
    """

    stage: str
    facts: Mapping[str, Any]
    correctness: Sequence[Correctness]
    rows: Sequence[Row]

    def write(self, path: Path) -> None:
        """Write JSON, with the derived figures beside the measured ones."""
        content = asdict(self)
        for entry, row in zip(content["rows"], self.rows, strict=True):
            entry["ratio"] = row.ratio
            entry["fraction_of_floor"] = row.fraction_of_floor
            entry["reached"] = row.reached
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StageResult:
        """Read what :meth:`write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(entry) for entry in content["rows"]]
        checks = [Correctness(**entry) for entry in content["correctness"]]
        return cls(content["stage"], content["facts"], checks, rows)


def _row(entry: dict[str, Any]) -> Row:
    """A row from its JSON object; derived figures are left out."""
    derived = ("ratio", "fraction_of_floor", "reached")
    given = {name: value for name, value in entry.items() if name not in derived}
    for name in ("seconds", "peer_seconds"):
        if given[name] is not None:
            given[name] = Percentiles(**given[name])
    if given["target"] is not None:
        given["target"] = Target(**given["target"])
    return Row(**given)
