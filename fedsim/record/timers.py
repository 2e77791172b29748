"""Seconds of each phase of a round, accumulated for the round's metric row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from fedsim.base.metric import Metric, writes


class PhaseTimers:
    """Accumulator of wall-clock seconds by phase name.

    Phases nest: inside ``phase("cai")`` a ``phase("dpo")`` counts under ``cai/dpo``, and its
    seconds are part of ``cai``'s as well, so that top-level phases add up to the round. Names use
    letters, digits and ``_``.

    A phase is also a range of that name in a ``torch.profiler`` trace.

    Args:
        synchronize: wait for the GPU's queue at both ends of a phase, so that a phase is charged
            for its own kernels.
        clock: seconds from a fixed, arbitrary start.
    """

    def __init__(
        self,
        synchronize: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}  # by path, such as "cai/dpo"
        self._open: list[str] = []  # names of the phases that are under way, outermost first

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block's time to ``name``, also when it raises."""
        assert name.isidentifier(), f"phase name {name!r} must be letters, digits and _"
        path = "/".join([*self._open, name])
        self._open.append(name)
        start = self._now()
        try:
            with torch.profiler.record_function(f"phase: {path}"):
                yield
        finally:
            self._seconds[path] = self._seconds.get(path, 0.0) + self._now() - start
            self._open.pop()

    @writes(
        Metric(
            "time/{phase}_s",
            "time of a phase; a nested one, such as time/cai/dpo_s, is part of its parent's",
            "s",
        )
    )
    def pop(self) -> dict[str, float]:
        """Return ``{"time/cai_s": seconds, ...}`` since the last call, sorted by name."""
        assert not self._open, f"phase {'/'.join(self._open)} is still open: pop between rounds"
        seconds = {f"time/{name}_s": value for name, value in sorted(self._seconds.items())}
        self._seconds = {}
        return seconds

    def _now(self) -> float:
        """Seconds on the clock, once the GPU has done its work."""
        if self._synchronize:
            torch.cuda.synchronize()
        return self._clock()


def top_level_seconds(row: Mapping[str, object]) -> dict[str, float]:
    """Return a metric row's seconds by phase, without phases that are part of another's time."""
    seconds = {}
    for name, value in row.items():
        phase = name.removeprefix("time/").removesuffix("_s")
        if name == f"time/{phase}_s" and "/" not in phase and isinstance(value, int | float):
            seconds[phase] = float(value)
    return seconds


def total_seconds(rows: Iterable[Mapping[str, object]]) -> float:
    """Sum over the top-level phases of all rows, in seconds."""
    return sum(sum(top_level_seconds(row).values()) for row in rows)
