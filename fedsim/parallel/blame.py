"""Blame for a failed collective: the rank that died, is stopped, or does not answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.base.errors import FedsimError
from fedsim.base.journal import LastSeen, Place, in_words, last_seen
from fedsim.base.processes import state_of

NOTICE_S = 2.0
"""Seconds that waiting ranks get to log it, before the silent ones are taken to have stopped."""

LOST, TIMED_OUT = "lost peer", "timed out"
"""Events in a rank's log: a collective failed because another rank was gone, or was late."""

EXPLAINED = frozenset(["error", "stopped", "lost rank", LOST, TIMED_OUT])
"""Events of a rank that has logged why it exits, or that it misses another."""

_GONE = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "connection refused",
    "no route",
    "remote process",
)
_TRANSPORT = ("gloo", "nccl", "store", "collective", "process group", "peer")
_LATE = ("timed out", "timeout")


def cause_of(error: BaseException) -> str | None:
    """Classify an error as a collective's that missed another rank.

    torch raises RuntimeError and its subclasses with the transport's message.

    Returns:
        :data:`LOST` or :data:`TIMED_OUT`; None for any other error.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, FedsimError):
        return None
    text = str(error).lower()
    if not any(word in text for word in _TRANSPORT):
        return None
    if any(word in text for word in _GONE):
        return LOST
    if any(word in text for word in _LATE):
        return TIMED_OUT
    return None


@dataclass(frozen=True)
class Blame:
    """The ranks to blame.

    Attributes:
        text: one sentence on all of them.
        place: of the first of them: rank, stage, round, client.
    """

    text: str
    place: Place


def blame(
    folder: Path,
    ranks: Sequence[int],
    timeout_s: float | None,
    notice_s: float = NOTICE_S,
) -> Blame | None:
    """Find the ranks that died, are stopped, or do not answer, from their logs and process states.

    Args:
        folder: the run directory, with every rank's log.
        ranks: the other ranks.
        timeout_s: seconds that a collective has waited; None where none has, so that no rank can
            be blamed for not answering.
        notice_s: seconds that ranks have to log that they wait in vain.

    Returns:
        The dead ranks if there are any, else the stopped, else the silent; None if all other ranks
        have logged why they exit.
    """
    time.sleep(notice_s)
    seen = [last_seen(folder, rank) for rank in ranks]
    quiet = [found for found in seen if found.pid and not EXPLAINED.intersection(found.events)]
    # State of a process -> its description, the surest sign of a fault first.
    kinds = {"gone": "ended without a word (killed?)", "stopped": "is stopped (SIGSTOP?)"}
    if timeout_s is not None:
        kinds["alive"] = f"did not answer for {timeout_s:g} s (parallel.timeout_s)"
    for state, what in kinds.items():
        guilty = [found for found in quiet if state_of(found.pid) == state]
        if guilty:
            text = "; ".join(f"rank {found.rank} {what}{_place(found)}" for found in guilty)
            return Blame(text, {"rank": guilty[0].rank, **guilty[0].place})
    return None


def _place(seen: LastSeen) -> str:
    """Place and time of a rank's last log entry, with a leading comma; "" without a place."""
    where = in_words(seen.place)
    if not where:
        return ""
    return f", last seen in {where} at {seen.utc}"
