"""Requests that several threads send at once, watched by the thread that started them.

The threads stop by themselves where the endpoint fails for good, and die with the process: an interrupt need not wait
for them. A turn that stays without a judgment is kept as such; several that follow each other end the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from fedsim.base.errors import JudgeError
from fedsim.evaluate.judge_client import Pause
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import StoppedError, TurnError

MOST_IN_A_ROW: Final = 5
"""So many turns without a judgment, one after the other, are taken for an endpoint that judges nothing."""

Ask = Callable[[Match, Pause], str]
Keep = Callable[[Match, str | None], None]
"""Keeps a judgment, None for a turn that got none; must be safe to call from any thread, one call at a time."""


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
        self._in_a_row = 0
        self._failed: list[TurnError] = []
        self._failure: Exception | None = None
        for i in range(self._running):
            threading.Thread(target=self._work, name=f"judge-{i}", daemon=True).start()

    @property
    def failure(self) -> JudgeError | None:
        """What ended the work early, or else what the turns without a judgment failed at; None if all have one."""
        assert self._failure is None or isinstance(self._failure, JudgeError)
        if self._failure is None and self._failed:
            others = f" (and {len(self._failed) - 1} others)" if len(self._failed) > 1 else ""
            return JudgeError(f"{self._failed[0]}{others}")
        return self._failure

    @property
    def gave_up(self) -> bool:
        """Return whether the work ended before every match was asked, or with a failure of all matches."""
        return self._failure is not None

    def wait(self, seconds: float) -> tuple[int, bool]:
        """Wait until all is over, at most so long; returns how many turns are over, and whether all is.

        Raises:
            Exception: whatever ``ask`` or ``keep`` raised that is no error of the endpoint.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, timeout=seconds)
            if self._failure is not None and not isinstance(self._failure, JudgeError):
                raise self._failure
            return self._done, self._running == 0

    def _work(self) -> None:
        try:
            while (match := self._next()) is not None:
                self._turn(match)
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

    def _turn(self, match: Match) -> None:
        judgment: str | None = None
        failure: TurnError | None = None
        try:
            judgment = self._ask(match, self._pause)
        except TurnError as error:
            failure = error
        with self._changed:
            self._keep(match, judgment)
            self._done += 1
            self._in_a_row = 0 if failure is None else self._in_a_row + 1
            if failure is not None:
                self._failed.append(failure)
                if self._in_a_row == MOST_IN_A_ROW:
                    raise JudgeError(f"{MOST_IN_A_ROW} turns in a row without a judgment; the last: {failure}")

    def _next(self) -> Match | None:
        with self._changed:
            return None if self._stop.is_set() else next(self._left, None)
