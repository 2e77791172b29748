"""Descriptions of the metrics of a run's stages, declared at the functions that write them.

A function declares what it writes with :func:`writes`, which refuses any other name; docs/metrics.md is made from the
declarations. Figures of benchmarks are declared by :class:`fedsim.base.figures.Figure`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
M = TypeVar("M", bound=Mapping[str, Any])

_VARIES: Final = re.compile(r"\\\{\w+\\\}")
"""``{client}`` in an escaped name."""


@dataclass(frozen=True)
class Metric:
    """One metric of a stage's row, or several that differ in a part of their name.

    Attributes:
        name: as in ``metrics.jsonl``; ``{client}`` stands for a part that varies.
        meaning: for people, without the unit.
        unit: "%" for a share in percent; "" for a number of things or a text.
        when: condition of its presence; "" = in every row of its stage.
        interval: it has a 95 % interval, ``<name>_low`` and ``<name>_high``.
        count: ``<name>_count`` says how many things it is taken over.
    """

    name: str
    meaning: str
    unit: str = ""
    when: str = ""
    interval: bool = False
    count: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """Endings of its name: none, and those of interval and count."""
        return ("", *(("_low", "_high") if self.interval else ()), *(("_count",) if self.count else ()))

    def covers(self, name: str) -> bool:
        """True if a name of a row is this metric's, or an end of its interval, or its count."""
        ends = "|".join(self.ends)
        return re.fullmatch(f"{_VARIES.sub('.+', re.escape(self.name))}({ends})", name) is not None


def writes(*metrics: Metric) -> Callable[[Callable[P, M]], Callable[P, M]]:
    """Declare the metrics that a function returns by name; the decorated function asserts that it returns no other."""
    names = {metric.name + end for metric in metrics for end in metric.ends}

    def declare(function: Callable[P, M]) -> Callable[P, M]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> M:
            found = function(*args, **kwargs)
            for name in found:
                known = name in names or any(metric.covers(name) for metric in metrics)
                assert known, f"{function.__qualname__} writes {name!r}; declare it as a Metric"
            return found

        checked.__metrics__ = metrics  # type: ignore[attr-defined]
        return checked

    return declare


def declared(function: Callable[..., Any]) -> Sequence[Metric]:
    """The metrics that a function declares with :func:`writes`."""
    found: Sequence[Metric] = function.__metrics__  # type: ignore[attr-defined]
    return found
