"""Progress of a run on the terminal: one live line per phase, or plain lines where there is no terminal.

Every line starts with the time since the run began. Lines carry names and figures only, never a prompt or a reply.

    [00:00:12] round 3/8 · train · 45/75 steps · 4.1 s · loss 1.43
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from fedsim.base.rounds import round_number
from fedsim.base.terminal import steady

Figure = float | int | str

_ERASE = "\r\x1b[2K"


class Progress:
    """Prints a run's progress to ``stream``; only rank 0 should be ``enabled``.

    Args:
        stream: usually ``sys.stderr``. Live lines are used if it is a terminal; one that is lost ends no run.
        enabled: False prints nothing at all.
        every_s: least seconds between two plain lines of one phase.
        live_every_s: least seconds between two redraws of a live line.
    """

    def __init__(
        self,
        stream: TextIO,
        enabled: bool = True,
        every_s: float = 5.0,
        live_every_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = steady(stream)
        self._enabled = enabled
        self._clock = clock
        self._start = clock()
        self._live = enabled and self._stream.isatty()
        self._gap_s = live_every_s if self._live else every_s
        self._place = ""

    def header(self, title: str, facts: Mapping[str, Figure]) -> None:
        """The run's first lines: a title and one ``name  value`` line per fact."""
        width = max((len(name) for name in facts), default=0)
        self._print("\n".join([title, *(f"  {name:<{width}}  {figure(value)}" for name, value in facts.items())]))

    def round(self, round_idx: int, num_rounds: int) -> None:
        """Later lines carry ``round i/n`` (counted from 1) until the next call or :meth:`outside_rounds`."""
        self._place = f"round {round_number(round_idx)}/{num_rounds}"

    def outside_rounds(self) -> None:
        """Later lines carry no round."""
        self._place = ""

    def phase(self, name: str, total: int = 0, unit: str = "") -> Phase:
        """Begin a phase of ``total`` pieces of work; 0 if that is not known. Use it in a ``with`` statement."""
        return Phase(self, name, total, unit)

    def note(self, text: str, **figures: Figure) -> None:
        """One line of its own, such as a cache hit or the result of a round."""
        self._print(self._line([self._place, text, _joined(figures)]))

    def _line(self, parts: list[str]) -> str:
        return f"[{elapsed(self._clock() - self._start)}] " + " · ".join(part for part in parts if part)

    def _print(self, text: str) -> None:
        if self._enabled:
            self._stream.write(f"{_ERASE if self._live else ''}{text}\n")
            self._stream.flush()

    def _draw(self, text: str) -> None:
        """Redraw the live line; a plain stream gets a line of its own."""
        if not self._live:
            self._print(text)
            return
        width = terminal_width(self._stream)
        self._stream.write(_ERASE + (text if len(text) < width else text[: max(width - 2, 0)] + "…"))
        self._stream.flush()


class Phase:
    """One phase on the screen; made by :meth:`Progress.phase`."""

    def __init__(self, progress: Progress, name: str, total: int, unit: str) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._unit = unit
        self._start = progress._clock()
        self._shown = self._start
        self._done = 0
        self._figures: dict[str, Figure] = {}
        self._held = ""  # a plain line for done == total, which the phase's last line would repeat

    def __enter__(self) -> Phase:
        if self._progress._live:
            self._progress._draw(self._text())
        return self

    @property
    def total(self) -> int:
        """Pieces of work of the phase, as last told; 0 if unknown."""
        return self._total

    def step(self, done: int, total: int, **figures: Figure) -> None:
        """:meth:`update` where the number of pieces is learnt on the way (or changes from part to part)."""
        self._total = total
        self.update(done, **figures)

    def update(self, done: int, **figures: Figure) -> None:
        """``done`` pieces are finished in all; figures replace those of the same name.

        A plain line that shows everything done waits for the next update, which means that it was only a part's last:
        the phase's own last line says the same.
        """
        if self._held:
            self._progress._print(self._held)
            self._held = ""
        self._done = done
        self._figures.update(figures)
        now = self._progress._clock()
        if not self._progress._enabled or now - self._shown < self._progress._gap_s:
            return
        self._shown = now
        if self._done == self._total and not self._progress._live:
            self._held = self._text()
        else:
            self._progress._draw(self._text())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the phase with one line that stays; a phase that an error ended says so."""
        self._progress._print(self._text("" if error is None else "stopped"))

    def _text(self, ending: str = "") -> str:
        count = f"{self._done}/{self._total}" if self._total else (str(self._done) if self._done else "")
        spent = self._progress._clock() - self._start
        work = f"{count} {self._unit}".rstrip() if count else ""
        parts = [self._progress._place, self._name, work, f"{spent:.1f} s", _joined(self._figures), ending]
        return self._progress._line(parts)


def elapsed(seconds: float) -> str:
    """``hh:mm:ss``."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def figure(value: Figure) -> str:
    """A number in at most four significant digits, whole numbers and texts as they are."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal behind ``stream``; 80 where it cannot be asked."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _joined(figures: Mapping[str, Figure]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in figures.items())
