"""Requests under way at once: everything once, one judgment kept at a time, and an end at the first failure."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from fedsim.base.errors import JudgeError
from fedsim.evaluate.judge_pool import MOST_IN_A_ROW, RequestPool
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import TurnError

MATCHES = [Match(81 + i, 1, "single-v1", "", f"Rate {i}.") for i in range(12)]


def discard(match: Match, judgment: str | None) -> None:
    """Keeps nothing."""


async def answered(match: Match) -> str:
    """An answer at once."""
    return "x"


def test_every_match_is_asked_once_by_as_many_as_allowed() -> None:
    under_way, most = 0, 0
    kept: list[str | None] = []
    inside = threading.Lock()

    async def ask(match: Match) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return match.user

    def keep(match: Match, judgment: str | None) -> None:
        assert inside.acquire(blocking=False), "one judgment is kept at a time"
        time.sleep(0.001)
        kept.append(judgment)
        inside.release()

    pool = RequestPool(MATCHES, ask, keep, workers=3)
    assert pool.wait(10.0) == (12, True) and pool.failure is None
    assert sorted(map(str, kept)) == sorted(m.user for m in MATCHES) and not pool.gave_up
    assert most == 3


def test_progress_can_be_watched() -> None:
    gate = threading.Event()

    async def ask(match: Match) -> str:
        return "x" if match is MATCHES[0] else str(await asyncio.to_thread(gate.wait, 5.0))

    pool = RequestPool(MATCHES[:2], ask, discard, 2)
    deadline = time.monotonic() + 5
    while pool.wait(0.001) != (1, False) and time.monotonic() < deadline:
        pass
    assert pool.wait(0.0) == (1, False)
    gate.set()
    assert pool.wait(5.0) == (2, True)


def test_the_first_failure_ends_it_and_what_is_under_way_is_kept() -> None:
    asked: list[int] = []
    kept: list[int] = []

    async def ask(match: Match) -> str:
        asked.append(match.question_id)
        if match.question_id == 82:
            raise JudgeError("down")
        try:
            await asyncio.sleep(30.0)
        except asyncio.CancelledError:
            return "fine"  # as a request does whose answer was under way
        return "late"

    pool = RequestPool(MATCHES, ask, lambda match, judgment: kept.append(match.question_id), workers=2)
    assert pool.wait(10.0) == (1, True) and pool.gave_up
    assert str(pool.failure) == "down" and sorted(asked) == [81, 82] and kept == [81]


def test_turns_without_a_judgment_are_kept_as_such_and_the_others_asked() -> None:
    """Every second turn fails, more of them than would end the work if they followed each other."""
    kept: dict[int, str | None] = {}

    async def ask(match: Match) -> str:
        if match.question_id % 2:
            raise TurnError(f"no text of {match.question_id}")
        return "fine"

    pool = RequestPool(MATCHES, ask, lambda match, judgment: kept.update({match.question_id: judgment}), workers=1)
    assert pool.wait(10.0) == (12, True) and not pool.gave_up
    assert kept == {match.question_id: None if match.question_id % 2 else "fine" for match in MATCHES}
    assert str(pool.failure) == "no text of 81 (and 5 others)"


def test_turn_after_turn_without_a_judgment_ends_it() -> None:
    asked: list[int] = []

    async def ask(match: Match) -> str:
        asked.append(match.question_id)
        if match is not MATCHES[0]:
            raise TurnError("no text")
        return "fine"

    pool = RequestPool(MATCHES, ask, discard, workers=1)
    assert pool.wait(10.0) == (1 + MOST_IN_A_ROW, True) and pool.gave_up and len(asked) == 1 + MOST_IN_A_ROW
    assert str(pool.failure) == f"{MOST_IN_A_ROW} turns in a row without a judgment; the last: no text"


def test_a_request_that_waits_is_given_up() -> None:
    async def ask(match: Match) -> str:
        await asyncio.sleep(0.0)
        if match is MATCHES[0]:
            raise JudgeError("down")
        await asyncio.sleep(30.0)
        return "late"

    pool = RequestPool(MATCHES[:2], ask, discard, workers=2)
    assert pool.wait(10.0) == (0, True) and str(pool.failure) == "down"


def test_an_error_of_ones_own_is_raised_where_it_is_watched() -> None:
    def keep(match: Match, judgment: str | None) -> None:
        raise OSError("disk full")

    pool = RequestPool(MATCHES, answered, keep, workers=2)
    with pytest.raises(OSError, match="disk full"):
        pool.wait(10.0)


def test_nothing_to_ask() -> None:
    assert RequestPool([], answered, discard, workers=4).wait(1.0) == (0, True)
