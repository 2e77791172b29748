"""What one check of a GPU found, and the file that a part of the checks writes them to as they are made."""

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

from tools.bench.rows import Correctness


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        part: of the checks.
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
        """Whether the error is within the tolerance; None for what was left out."""
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
    """Takes a part's checks and puts each on disk at once: what a part that is ended has found stays.

    Attributes:
        part: its name.
        file: JSON lines; None keeps them in memory alone.
        checks: all so far.
    """

    part: str
    file: Path | None = None
    checks: list[Check] = field(default_factory=list)
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

    @contextmanager
    def guarding(self, name: str) -> Iterator[None]:
        """A block whose error is a failed check, so that the part goes on."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            self.add(name, math.nan, 0.0, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")

    def _seconds(self) -> float:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        return round(spent, 3)

    def _take(self, check: Check) -> None:
        self.checks.append(check)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(check.entry(), ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how much of it.

    Attributes:
        device: a GPU, or the CPU of a dry run.
        dry: micro sizes.
        folder: for files, which are deleted at the end.
    """

    device: torch.device
    dry: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"
