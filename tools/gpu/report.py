"""Report of a part: checks that pass or fail, and figures, on disk as soon as they are known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsim.study.bench_rows import Correctness


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        part: of the call.
        name: what is compared with what, and in which measure.
        error: the distance; NaN fails.
        tolerance: the largest distance that passes.
        seconds: since the part's last check.
        note: what a reader must know beside it, such as why something broke off.
        left_out: it could not be made here; ``note`` says why. It neither passes nor fails.
    """

    part: str
    name: str
    error: float
    tolerance: float
    seconds: float = 0.0
    note: str = ""
    left_out: bool = False

    @property
    def passed(self) -> bool | None:
        """Return whether the error is within the tolerance; None for what was left out."""
        return None if self.left_out else self.error <= self.tolerance

    def entry(self) -> dict[str, Any]:
        """As JSON holds it, which knows no NaN."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {**numbers, "passed": self.passed}

    @classmethod
    def read(cls, entry: dict[str, Any]) -> Check:
        """From :meth:`entry`."""
        given = {name: value for name, value in entry.items() if name != "passed"}
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in given.items()}
        return cls(**values)


@dataclass
class Report:
    """Takes what a part finds and puts it on disk at once: what a part that is ended has found stays.

    Attributes:
        part: its name.
        file: JSON lines, of checks and of figures; None keeps them in memory alone.
        checks: all so far.
        figures: what was measured, by name.
    """

    part: str
    file: Path | None = None
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def add(self, name: str, error: float, tolerance: float, note: str = "") -> None:
        """A comparison that was made."""
        self._take(Check(self.part, name, float(error), float(tolerance), self._seconds(), note))

    def leave_out(self, name: str, why: str) -> None:
        """One that cannot be made here."""
        self._take(Check(self.part, name, math.nan, math.nan, self._seconds(), why, left_out=True))

    def take(self, found: Iterable[Correctness], of: str = "") -> None:
        """Comparisons of the benchmark's."""
        for check in found:
            self.add(of + check.what, check.error, check.limit)

    def figure(self, name: str, value: Any) -> None:
        """Something measured, of what JSON can hold."""
        self.figures[name] = value
        self._write({"figure": name, "value": value})

    @contextmanager
    def guarding(self, name: str) -> Iterator[None]:
        """A block whose error is a failed check, so that the part goes on."""
        try:
            yield
        except Exception as error:  # whatever a device or a kernel does, the rest is tried
            line = next(iter(str(error).splitlines()), "")
            self.add(name, math.nan, 0.0, f"{type(error).__name__}: {line}")

    def _seconds(self) -> float:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        return round(spent, 3)

    def _take(self, check: Check) -> None:
        self.checks.append(check)
        self._write(check.entry())

    def _write(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_lines(path: Path, part: str) -> Report:
    """What a part has written so far; a line that was cut short is left out."""
    found = Report(part)
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "figure" in entry:
            found.figures[entry["figure"]] = entry["value"]
        else:
            found.checks.append(Check.read(entry))
    return found


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how much of it.

    Attributes:
        device: a GPU, or the CPU of a dry run.
        dry: micro sizes.
        folder: for files, which are deleted at the end.
        keep: folder whose files are brought back; None: none are.
        ends_at: ``time.monotonic()`` at which the part is ended.
        commit: of the tree, where it is no clone.
    """

    device: torch.device
    dry: bool
    folder: Path
    keep: Path | None = None
    ends_at: float = math.inf
    commit: str | None = None

    @property
    def cuda(self) -> bool:
        """Return whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the part is ended."""
        return self.ends_at - time.monotonic()

    def kept(self, name: str) -> Path:
        """A file that is brought back, in a folder that exists."""
        path = (self.folder if self.keep is None else self.keep) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
