"""Exit of the processes of a run that cannot go on: one names the cause and the place, the others end quietly.

An error that all ranks share leaves on rank 0, any other on the rank that raised it. A rank that dies, or stands still,
says nothing: those that miss it find out from the ranks' logs who it was and where.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

import torch.distributed as dist

from fedsim.base import user_code
from fedsim.base.disk import is_disk_full
from fedsim.base.errors import DiskFullError, FedsimError, LostRankError, RunError, Stopped
from fedsim.base.exit_file import Reason, write_ending
from fedsim.base.journal import Journal, Place, in_words
from fedsim.base.launching import line_of, unforeseen
from fedsim.base.out_of_memory import explained, is_out_of_memory
from fedsim.parallel.blame import Blame, blame, cause_of
from fedsim.parallel.signals import GRACE_S, signal_name

GRANT_S: Final = 3.0
"""Seconds that ranks give rank 0 to fail too, and so to speak for all."""

QUIET_EXIT_S: Final = 1.0
"""Seconds that a quiet rank waits before it exits: launchers end every rank when one exits."""

LAST_S: Final = 30.0
"""Seconds that taking the process group down may take; then the process ends itself, whatever holds it."""

GOES_ON: Final = "start the same command again: it goes on after the last finished round"


def to_picklable(error: Exception, journal: Journal) -> FedsimError:
    """An error that can travel to other ranks: fedsim's own as it is, any other with its traceback as text."""
    if isinstance(error, FedsimError):
        found: FedsimError = error
    elif is_disk_full(error):
        found = DiskFullError(str(error))
    elif is_out_of_memory(error):
        found = explained(error, str(journal.place_of(error).get("stage", "")))
    elif user_code.place_of(error):
        found = RunError(user_code.in_words(error))
    else:
        trace = "".join(traceback.format_exception(error))
        found = RunError(f"{type(error).__name__}: {error}\n{trace}")
    _set_place(found, journal, error)
    return found


@contextmanager
def kill_after(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer."""
    last = threading.Timer(seconds, os._exit, (2,))
    last.daemon = True
    last.start()
    try:
        yield
    finally:
        last.cancel()


@contextmanager
def single_process(journal: Journal) -> Iterator[None]:
    """The block of a run of one process: an error is also left in its log and in ``exit.json``."""
    try:
        yield
    except Exception as error:
        _log_error(error, journal)
        _write_exit_file(error, journal)
        raise
    finally:
        journal.close()


@contextmanager
def multi_process(store: dist.Store, journal: Journal, size: int, timeout_s: float) -> Iterator[None]:
    """The block of one rank of several: its error leaves as it is on the rank that speaks; the others exit.

    Args:
        store: shared by all ranks.
        timeout_s: how long a collective waits.

    Raises:
        LostRankError: in the place of a collective's error.
        SystemExit: another rank speaks.
    """
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if cause is None:
            _log_error(error, journal)
        else:
            journal.write(cause, message=str(error))
        reported = _report(error, cause, store, journal, size, timeout_s)
        if reported is None:
            time.sleep(QUIET_EXIT_S)
            status = 2
            if cause is None and isinstance(error, FedsimError):
                status = error.status
            raise SystemExit(status) from error
        if reported is error:
            raise
        raise reported from None
    finally:
        journal.close()


def _report(
    error: Exception, cause: str | None, store: dist.Store, journal: Journal, size: int, timeout_s: float
) -> Exception | None:
    """Write this rank's error to ``exit.json``, if it is the rank that reports.

    Args:
        error: as it was raised on this rank.
        cause: of a failed collective (:func:`cause_of`); None for another error.

    Returns:
        The error to raise; None where another rank reports.
    """
    report = _should_report(store, journal, size)
    if report is Report.NO:
        return None
    reported = error
    if cause is not None:
        reported = _lost_rank_error(error, journal, size, timeout_s)
    was_first = _write_exit_file(reported, journal)
    # For a lost rank, or without the store's answer, several ranks may come here: the first one reports.
    must_be_first = report is Report.UNKNOWN or cause is not None
    if must_be_first and not was_first:
        return None
    return reported


def exit_now(journal: Journal, number: int, size: int, at_once: bool = False) -> None:
    """Say that a signal ends this process in mid-round: the first to write ``exit.json`` tells it.

    A launcher also signals the ranks that are left when one has died: then that is the cause.

    Args:
        at_once: do not wait for what other ranks may still write.
    """
    where = in_words(journal.place) or "the preparation"
    message = (
        f"stopped: {signal_name(number)} came in {where}: what was begun there is done again when the same command is "
        "started"
    )
    journal.write("stopped", message=message)
    reason: Reason = "stopped"
    place: Place = {"rank": journal.rank, **journal.place}
    if size > 1 and not at_once and (blamed := _blamed(journal, size, None)) is not None:
        reason, place, message = "lost rank", blamed.place, f"error: {blamed.text}; {GOES_ON}"
    if journal.folder is None or write_ending(journal.folder, reason, 128 + number, message, place):
        print(message, file=sys.stderr, flush=True)


def log_signal(journal: Journal, number: int) -> None:
    """Note a signal in the log, and tell who presses Ctrl-C what follows; SIGTERM may be a launcher's own."""
    journal.write("signal", name=signal_name(number))
    if journal.rank == 0 and number == signal.SIGINT:
        told = f"the run ends after this round, or where it is in {GRACE_S:g} s; press Ctrl-C again to end it now"
        print(f"{signal_name(number)}: {told}", file=sys.stderr, flush=True)


def _log_error(error: Exception, journal: Journal) -> None:
    """The error in this rank's log, with its place and, where it is a bug, its traceback."""
    _set_place(error, journal, error)
    if isinstance(error, FedsimError):
        journal.write("error", message=line_of(error))
    else:
        trace = "".join(traceback.format_exception(error))
        journal.write("error", message=line_of(unforeseen(error)), trace=trace)


def _write_exit_file(error: Exception, journal: Journal) -> bool:
    """Write ``exit.json``; False if another rank was the first to."""
    if journal.folder is None:
        return True
    known = error if isinstance(error, FedsimError) else unforeseen(error)
    status = error.status if isinstance(error, FedsimError) else 1
    reason: Reason = (
        "stopped" if isinstance(error, Stopped) else "lost rank" if isinstance(error, LostRankError) else "error"
    )
    place = known.place or {"rank": journal.rank, **journal.place_of(error)}
    return write_ending(journal.folder, reason, status, line_of(known), place)


def _set_place(error: Exception, journal: Journal, raised: Exception) -> None:
    """Note rank, stage, round and client, unless they are known, or it is an error that names what it is about.

    Args:
        raised: what was raised where this rank was.
    """
    names_its_own = isinstance(error, FedsimError) and not isinstance(error, RunError)
    where = journal.place_of(raised)
    if where and not names_its_own and not getattr(error, "place", None):
        vars(error)["place"] = {"rank": journal.rank, **where}


def _lost_rank_error(error: Exception, journal: Journal, size: int, timeout_s: float) -> LostRankError:
    """The collective's error in fedsim's words, with the rank to blame."""
    blamed = _blamed(journal, size, timeout_s)
    if blamed is None:
        return LostRankError(f"another rank has left ({' '.join(str(error).split())[:200]}); {GOES_ON}")
    found = LostRankError(f"{blamed.text}; {GOES_ON}")
    found.place = blamed.place
    return found


def _blamed(journal: Journal, size: int, timeout_s: float | None) -> Blame | None:
    others = [rank for rank in range(size) if rank != journal.rank]
    return None if journal.folder is None else blame(journal.folder, others, timeout_s)


class Report(Enum):
    """Answer to whether a failed rank reports its error."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"
    """The store does not answer: the rank that holds it may be the one that is gone."""


def _should_report(store: dist.Store, journal: Journal, size: int) -> Report:
    """Decide whether this failed rank reports: rank 0 if it fails too, else the first that failed.

    A store that does not answer may block for long, so a thread of its own asks it.
    """
    answers: list[Report] = []
    asking = threading.Thread(
        target=lambda: answers.append(_ask_store(store, journal.rank)), daemon=True
    )
    asking.start()
    asking.join(2 * GRANT_S)
    holds_store = journal.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if holds_store:
        atexit.register(_keep_store_alive, store, size)
    if not answers:
        return Report.UNKNOWN
    return answers[0]


def _ask_store(store: dist.Store, rank: int) -> Report:
    """Count this rank's failure in the store, and learn from it whether to report.

    A rank other than 0 waits up to :data:`GRANT_S` for rank 0 to fail, which then reports.
    """
    deadline = time.monotonic() + GRANT_S
    try:
        if rank == 0:
            store.add("fedsim/rank_0_failed", 1)
        while rank != 0 and store.add("fedsim/rank_0_failed", 0) == 0:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        may_report = rank == 0 or store.add("fedsim/rank_0_failed", 0) == 0
        # Only the first rank to raise the counter from 0 reports.
        reports = may_report and store.add("fedsim/reporting", 1) == 1
        store.add("fedsim/failures", 1)
    except RuntimeError:
        return Report.UNKNOWN
    return Report.YES if reports else Report.NO


def _keep_store_alive(store: dist.Store, size: int, patience_s: float = 10.0) -> None:
    """Stay until every rank has asked the store of this process, or for ``patience_s`` seconds."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and int(store.add("fedsim/failures", 0)) < size:
        time.sleep(0.05)
