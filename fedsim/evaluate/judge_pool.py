"""A pool of concurrent requests on an event loop in a daemon thread.

The loop's thread ends with the process: an interrupt does not wait for it. A turn without a
judgment is kept as such; several in a row end the rest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from fedsim.base.errors import JudgeError
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import TurnError

MOST_IN_A_ROW: Final = 5
"""Number of turns in a row without a judgment after which the endpoint is given up."""

Ask = Callable[[Match], Awaitable[str]]
Keep = Callable[[Match, str | None], None]
"""Keeps a judgment, None for a turn without one; called on the event loop, one call at a time."""


@functools.cache
def request_loop() -> asyncio.AbstractEventLoop:
    """Start the event loop of all requests, once a process, and return it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge-requests", daemon=True).start()
    return loop


class RequestPool:
    """Requests for all matches; each judgment is kept as it arrives.

    A failure of all matches cancels every request. A judgment that still arrives is kept.

    Args:
        matches: the turns to ask for.
        ask: one request with its retries.
        keep: called for one judgment at a time.
        workers: requests under way at once.

    Attributes:
        failure: once all is over, the error that ended the work early, or else the first turn's
            error; None if all are judged.
        gave_up: the work ended early, with a failure of all matches.
    """

    def __init__(self, matches: Sequence[Match], ask: Ask, keep: Keep, workers: int) -> None:
        self.failure: JudgeError | None = None
        self.gave_up = False
        self._ask = ask
        self._keep = keep
        self._left: Iterator[Match] = iter(matches)
        self._done = 0
        self._in_a_row = 0
        self._failed: list[TurnError] = []
        # From here on the event loop's thread writes the attributes above.
        self._work = asyncio.run_coroutine_threadsafe(
            self._all(min(workers, len(matches))),
            request_loop(),
        )

    def wait(self, seconds: float) -> tuple[int, bool]:
        """Wait until all turns are over, at most ``seconds``.

        Returns:
            The number of turns that are over, and whether all are.

        Raises:
            Exception: any error of ``ask`` or ``keep`` that is not the endpoint's.
        """
        concurrent.futures.wait([self._work], timeout=seconds)
        over = self._work.done()
        if over:
            self._work.result()
        return self._done, over

    async def _all(self, workers: int) -> None:
        """Run all turns in ``workers`` tasks and set :attr:`failure` and :attr:`gave_up`."""
        try:
            # Each task takes turns from the same iterator.
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._turns())
        except ExceptionGroup as errors:
            first = errors.exceptions[0]  # the earliest: it cancelled the other tasks
            if not isinstance(first, JudgeError):
                raise first from None
            self.failure, self.gave_up = first, True
        if self._failed and not self.gave_up:
            others = ""
            if len(self._failed) > 1:
                others = f" (and {len(self._failed) - 1} others)"
            self.failure = JudgeError(f"{self._failed[0]}{others}")

    async def _turns(self) -> None:
        """Ask for one turn after the other, until none is left or the work is given up."""
        task = asyncio.current_task()
        for match in self._left:
            judgment: str | None = None
            try:
                judgment = await self._ask(match)
            except TurnError as error:
                self._failed.append(error)
            self._keep(match, judgment)
            self._done += 1

            # The tasks share the iterator and the count of turns in a row without a judgment.
            if judgment is None:
                self._in_a_row += 1
            else:
                self._in_a_row = 0
            if self._in_a_row == MOST_IN_A_ROW:
                last = self._failed[-1]
                raise JudgeError(
                    f"{MOST_IN_A_ROW} turns in a row without a judgment; the last: {last}",
                )
            # Cancelled while it waited for an answer: that is kept, and is the last.
            if task is None or task.cancelling():
                return
