"""SIGTERM, SIGINT and SIGHUP as stop requests: the process ends after the round, or in mid-round.

The round gets :data:`GRACE_S` seconds. Results of finished rounds are on disk, so that nothing is
lost either way; an unfinished round is repeated when the same command is started, with the same
bits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

GRACE_S: Final = 20.0
"""Seconds from the signal until the process ends itself in mid-round: launchers kill after 30 s."""

_LAST_S: Final = 8.0
"""Seconds that reporting it may take."""

_ONE_KEY_S: Final = 1.0
"""A SIGINT within this of the first is the same key, passed on by a launcher."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Record of whether this process was asked to stop.

    A thread reads the signals: Python's handlers run in the main thread only, which may be waiting
    for another rank.

    Attributes:
        signal: the first signal that came; 0 before.
        on_signal: called when it comes.
        on_deadline: called with the signal just before the process ends in mid-round, and with True
            if a second Ctrl-C ends it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.on_signal: Callable[[int], None] = lambda number: None
        self.on_deadline: Callable[[int, bool], None] = lambda number, at_once: None
        self._since = 0.0
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._is_over = False

    @contextmanager
    def listening(self, grace_s: float = GRACE_S) -> Iterator[None]:
        """Take the signals inside the block; a second press of Ctrl-C ends the process at once.

        Handlers belong to the main thread: elsewhere nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A pipe through which Python's C handler passes signal numbers to the watcher.
        read, write = os.pipe()
        os.set_blocking(write, False)
        watcher = threading.Thread(target=self._watch, args=(read, grace_s), daemon=True)
        watcher.start()
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # Python needs a handler, or the signal keeps its default action.
        handlers = {number: signal.signal(number, lambda *_: None) for number in heard(SIGNALS)}
        try:
            yield
        finally:
            self.mark_done()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)  # ends the watcher
            watcher.join(1.0)

    def mark_done(self) -> None:
        """Note that the process is exiting or done, so that the timer no longer ends it."""
        with self._lock:
            self._is_over = True
            if self._timer is not None:
                self._timer.cancel()

    def _watch(self, read: int, grace_s: float) -> None:
        """Read signal numbers, one byte each, until the pipe is closed."""
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while True:
                number = int.from_bytes(pipe.read(1))
                if number == 0:  # the pipe is closed
                    break
                # The first signal sets the timer; a later Ctrl-C, unless it is the same key, ends
                # at once.
                if number in SIGNALS and not self.signal:
                    self._first(number, grace_s)
                elif number == signal.SIGINT and time.monotonic() - self._since > _ONE_KEY_S:
                    self._end(at_once=True)

    def _first(self, number: int, grace_s: float) -> None:
        """Record the first signal and start the timer that ends the process."""
        self.signal, self._since = number, time.monotonic()
        with self._lock:
            if self._is_over:
                return
            self._timer = threading.Timer(grace_s, self._end)
            self._timer.daemon = True
            self._timer.start()
        with suppress(OSError):  # the terminal may be gone
            self.on_signal(number)

    def _end(self, at_once: bool = False) -> None:
        """End the process in mid-round: the round took too long, or Ctrl-C came twice."""
        # Should the report hang, this timer ends the process.
        last = threading.Timer(_LAST_S, os._exit, (128 + self.signal,))
        last.daemon = True
        last.start()
        try:
            self.on_deadline(self.signal, at_once)
            sys.stderr.flush()
        finally:
            os._exit(128 + self.signal)


def heard(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Drop SIGHUP where it is ignored: processes under nohup outlive their terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (ignored and number == signal.SIGHUP)]


def signal_name(number: int) -> str:
    """Such as ``SIGTERM``."""
    return signal.Signals(number).name
