"""SIGTERM and SIGINT as a wish to stop: at the end of the round where that is near, else where the run stands.

What a finished round gave is on disk, so that nothing is lost either way; the round that was begun is done again when
the same command is started, with the same bits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

GRACE_S: Final = 20.0
"""Seconds from the signal until the process ends itself in mid-round: launchers kill after 30 s."""

_ONE_KEY_S: Final = 1.0
"""A SIGINT within this of the first is the same key, passed on by a launcher."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = 0
        self.on_deadline: Callable[[int], None] = lambda number: None
        self._since = 0.0
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self, grace_s: float = GRACE_S) -> Iterator[None]:
        """Take the signals inside the block; a second press of Ctrl-C ends the process at once.

        Handlers belong to the main thread: elsewhere nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal and number == signal.SIGINT and time.monotonic() - self._since > _ONE_KEY_S:
                self._end()
            if not self.signal:
                self.signal, self._since = number, time.monotonic()
                self._timer = threading.Timer(grace_s, self._end)
                self._timer.daemon = True
                self._timer.start()

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()

    def _end(self) -> None:
        """The round did not end in time."""
        try:
            self.on_deadline(self.signal)
            sys.stderr.flush()
        finally:
            os._exit(128 + self.signal)


def signal_name(number: int) -> str:
    """Such as ``SIGTERM``."""
    return signal.Signals(number).name
