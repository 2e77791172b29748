"""Requests that several threads send at once, watched by the thread that started them.

The threads stop by themselves at the first failure, and die with the process: an interrupt need not wait for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from fedsim.errors import JudgeError
from fedsim.evaluate.judge_client import Pause, StoppedError
from fedsim.evaluate.judge_prompts import Match

Ask = Callable[[Match, Pause], str]
Keep = Callable[[Match, str], None]
"""Keeps a judgment; must be safe to call from any thread, one call at a time."""


class RequestPool:
    """Asks for every match and keeps each judgment as it arrives.

    Args:
        matches: what to ask.
        ask: one request with its retries.
        keep: called for one judgment at a time.
        workers: requests under way at once.
        pause: waits before another attempt; None waits until the time is over or the work is given up.
    """

    def __init__(
        self, matches: Sequence[Match], ask: Ask, keep: Keep, workers: int, pause: Pause | None = None
    ) -> None:
        self._ask = ask
        self._keep = keep
        self._left: Iterator[Match] = iter(matches)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._pause = self._stop.wait if pause is None else pause
        self._running = min(workers, len(matches))
        self._done = 0
        self._failure: Exception | None = None
        for i in range(self._running):
            threading.Thread(target=self._work, name=f"judge-{i}", daemon=True).start()

    @property
    def failure(self) -> JudgeError | None:
        """The first request that failed for good."""
        assert self._failure is None or isinstance(self._failure, JudgeError)
        return self._failure

    def wait(self, seconds: float) -> tuple[int, bool]:
        """Wait until all is over, at most so long; returns how many are kept, and whether it is over.

        Raises:
            Exception: whatever ``ask`` or ``keep`` raised that is no :class:`JudgeError`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, timeout=seconds)
            if self._failure is not None and not isinstance(self._failure, JudgeError):
                raise self._failure
            return self._done, self._running == 0

    def _work(self) -> None:
        try:
            while (match := self._next()) is not None:
                judgment = self._ask(match, self._pause)
                with self._changed:
                    self._keep(match, judgment)
                    self._done += 1
        except StoppedError:
            pass
        except Exception as error:  # handed to the watching thread
            with self._changed:
                self._failure = self._failure or error
            self._stop.set()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _next(self) -> Match | None:
        with self._changed:
            return None if self._stop.is_set() else next(self._left, None)
