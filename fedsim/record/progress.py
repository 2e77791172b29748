"""Progress of a run on the terminal: one live line per phase, or plain lines without a terminal.

Every line starts with the time since the run began. Lines carry names and figures only, never a
prompt or a reply.

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
    """Printer of a run's progress to ``stream``; only rank 0 should be ``enabled``.

    Args:
        stream: usually ``sys.stderr``. Live lines are used if it is a terminal; one that is lost
            ends no run.
        enabled: False prints nothing at all.
        every_s: least seconds between two plain lines of one phase.
        live_every_s: least seconds between two redraws of a live line.
        clock: seconds from a fixed, arbitrary start.
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
        """Print the run's first lines: a title and one ``name  value`` line per fact."""
        width = max((len(name) for name in facts), default=0)  # characters
        lines = [title]
        for name, value in facts.items():
            lines.append(f"  {name:<{width}}  {figure(value)}")
        self._print("\n".join(lines))

    def round(self, round_idx: int, num_rounds: int) -> None:
        """Let later lines carry ``round i/n`` (from 1), until :meth:`outside_rounds`."""
        self._place = f"round {round_number(round_idx)}/{num_rounds}"

    def outside_rounds(self) -> None:
        """Let later lines carry no round."""
        self._place = ""

    def phase(self, name: str, total: int = 0, unit: str = "") -> Phase:
        """Begin a phase; use it in a ``with`` statement.

        Args:
            total: pieces of work; 0 if not known.
            unit: of the pieces.
        """
        return Phase(self, name, total, unit)

    def note(self, text: str, **figures: Figure) -> None:
        """Print a line of its own, such as a cache hit or the result of a round."""
        self._print(self._line([self._place, text, _joined(figures)]))

    def _line(self, parts: list[str]) -> str:
        """Join the parts that are not empty behind the time since the run began."""
        words = " · ".join(part for part in parts if part)
        return f"[{elapsed(self._clock() - self._start)}] {words}"

    def _print(self, text: str) -> None:
        """Print a line that stays, in place of the live one."""
        if self._enabled:
            if self._live:
                text = f"{_ERASE}{text}"
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _draw(self, text: str) -> None:
        """Redraw the live line; a plain stream gets a line of its own."""
        if not self._live:
            self._print(text)
            return
        width = terminal_width(self._stream)
        if len(text) >= width:  # a line that wraps could not be erased
            text = f"{text[: max(width - 2, 0)]}…"
        self._stream.write(f"{_ERASE}{text}")
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
        """Pieces of work of the phase, as last given; 0 if unknown."""
        return self._total

    def step(self, done: int, total: int, **figures: Figure) -> None:
        """:meth:`update` with a new number of pieces, where it is not known at the beginning."""
        self._total = total
        self.update(done, **figures)

    def update(self, done: int, **figures: Figure) -> None:
        """Show that ``done`` pieces are finished in all; figures replace those of the same name.

        A plain line that shows everything done is held back until the next update, as the phase's
        last line would repeat it. A next update means that only a part of the phase was done.
        """
        if self._held:
            self._progress._print(self._held)
            self._held = ""
        # A phase shows at most one line in each gap.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the phase with one line that stays; a phase that an error ended says so."""
        self._progress._print(self._text("" if error is None else "stopped"))

    def _text(self, ending: str = "") -> str:
        """The phase's line: round, name, work done, seconds, figures and ``ending``."""
        work = ""
        if self._total:
            work = f"{self._done}/{self._total} {self._unit}".rstrip()
        elif self._done:
            work = f"{self._done} {self._unit}".rstrip()
        seconds = self._progress._clock() - self._start
        parts = [self._progress._place, self._name, work]
        parts += [f"{seconds:.1f} s", _joined(self._figures), ending]
        return self._progress._line(parts)


def elapsed(seconds: float) -> str:
    """Format seconds as ``hh:mm:ss``."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def figure(value: Figure) -> str:
    """Format a number in at most four significant digits, whole numbers and texts as they are."""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def terminal_width(stream: TextIO) -> int:
    """Return the columns of the terminal behind ``stream``; 80 where they are unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _joined(figures: Mapping[str, Figure]) -> str:
    """Join figures, such as ``loss 1.43, learning rate 5e-05``."""
    words = [f"{name.replace('_', ' ')} {figure(value)}" for name, value in figures.items()]
    return ", ".join(words)
