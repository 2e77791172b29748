"""Blame for a failed collective: the rank that died, stands still, or does not answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.base.errors import FedsimError
from fedsim.base.journal import LastSeen, Place, in_words, last_seen
from fedsim.base.processes import state_of

NOTICE_S = 2.0
"""How long the ranks that wait are given to say so before the others are held to stand still."""

LOST, TIMED_OUT = "lost peer", "timed out"
"""Events in a rank's log: a collective failed because another rank was gone, or did not come."""

SPOKEN = frozenset(["error", "stopped", "lost rank", LOST, TIMED_OUT])
"""Events of a rank that has said why it leaves, or that it misses another."""

_GONE = ("connection closed", "connection reset", "broken pipe", "connection refused", "no route", "remote process")
_LATE = ("timed out", "timeout")


def cause_of(error: BaseException) -> str | None:
    """:data:`LOST` or :data:`TIMED_OUT` where a collective failed for want of another rank; None for another error.

    torch raises RuntimeError and its subclasses with the transport's words.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, FedsimError):
        return None
    text = str(error).lower()
    if not any(word in text for word in ("gloo", "nccl", "store", "collective", "process group", "peer")):
        return None
    if any(word in text for word in _GONE):
        return LOST
    return TIMED_OUT if any(word in text for word in _LATE) else None


@dataclass(frozen=True)
class Blame:
    """Who is to blame.

    Attributes:
        text: one sentence on every rank that is.
        place: where the first of them was.
    """

    text: str
    place: Place


def blame(folder: Path, ranks: Sequence[int], timeout_s: float | None, notice_s: float = NOTICE_S) -> Blame | None:
    """The ranks that ended without a word, stand still, or do not answer; None if all others have spoken.

    Args:
        folder: the run directory, with every rank's log.
        ranks: the others.
        timeout_s: how long a collective has waited; None where none has, so that nobody can be said not to answer.
        notice_s: how long ranks have to write that they wait in vain.
    """
    time.sleep(notice_s)
    seen = [last_seen(folder, rank) for rank in ranks]
    quiet = [found for found in seen if found.pid and not SPOKEN.intersection(found.events)]
    kinds = {"gone": "ended without a word (killed?)", "stopped": "is stopped (SIGSTOP?)"}
    if timeout_s is not None:
        kinds["alive"] = f"did not answer for {timeout_s:g} s (parallel.timeout_s)"
    for state, what in kinds.items():
        if guilty := [found for found in quiet if state_of(found.pid) == state]:
            text = "; ".join(f"rank {found.rank} {what}{_place(found)}" for found in guilty)
            return Blame(text, {"rank": guilty[0].rank, **guilty[0].place})
    return None


def _place(seen: LastSeen) -> str:
    where = in_words(seen.place)
    return f", last seen in {where} at {seen.utc}" if where else ""
