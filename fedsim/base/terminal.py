"""Standard output and error that cannot end a run.

All that a run shows is also in its directory. A terminal or pipe that takes no more text is
therefore given up: its reader has ended, the tty is lost, the disk behind it is full. A character
that its encoding lacks is replaced.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Terminal:
    """A text stream to which writing raises no error.

    Args:
        stream: where text goes, such as ``sys.stderr``; None, as where the process was started
            without one, takes none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._stream = stream
        self._is_lost = False
        if isinstance(self._stream, io.TextIOWrapper):
            # A character that the encoding lacks is replaced.
            wrapper = self._stream
            self._attempt(lambda: wrapper.reconfigure(errors="replace"))

    def write(self, text: str) -> int:
        """Write ``text``, or drop it where the stream is lost; returns its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        """True for a terminal that can be written to."""
        return bool(self._attempt(self._stream.isatty))

    def settle(self) -> None:
        """Flush, or give the stream up, so that the flush at the interpreter's end cannot fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        # All else, such as ``encoding`` and ``fileno``, is the stream's.
        return getattr(self._stream, name)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """Result of ``work``; None where it fails, or the stream is lost."""
        if self._is_lost:
            return None
        try:
            return work()
        except BlockingIOError:  # a full pipe that does not block: only this text is dropped
            return None
        except (OSError, ValueError):  # EPIPE, EIO, ENOSPC …; a closed file
            self._give_up()
            return None

    def _give_up(self) -> None:
        """Put the null device in the file descriptor's place, also for buffered text and C code."""
        self._is_lost = True
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)


def steady(stream: TextIO | None) -> TextIO:
    """``stream`` as a :class:`Terminal`; one that is a Terminal already is returned as it is."""
    return cast(TextIO, stream if isinstance(stream, Terminal) else Terminal(stream))


@contextmanager
def steady_terminal() -> Iterator[None]:
    """Keep lost standard output and error from ending the block; also a decorator."""
    _occupy_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = steady(sys.stdout), steady(sys.stderr)

    # The block, then a last flush before the streams are put back.
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Terminal):
                stream.settle()
        sys.stdout, sys.stderr = before


def _occupy_standard_files() -> None:
    """Open the null device in place of closed standard descriptors (0, 1, 2).

    Otherwise the next file that is opened would get such a number, and errors of C code would be
    written into it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:  # each one opened takes the lowest free number
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
