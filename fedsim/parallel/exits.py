"""Exit of a run's processes after a failure: one reports its cause and place, the others exit.

Rank 0 reports an error that all ranks share, and the rank that raised it any other. A rank that
died or is stopped cannot report: the ranks that miss it look it up in the ranks' logs
(:mod:`fedsim.parallel.blame`).
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
"""Seconds that ranks wait for rank 0 to fail too, which then reports for all."""

QUIET_EXIT_S: Final = 1.0
"""Seconds that a quiet rank waits before it exits: launchers end every rank when one exits."""

LAST_S: Final = 30.0
"""Seconds that the process group's teardown may take before the process is killed."""

GOES_ON: Final = "start the same command again: it goes on after the last finished round"


class Report(Enum):
    """Answer to whether a failed rank reports its error."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"
    """The store does not answer: the rank that holds it may be the one that is gone."""


def to_picklable(error: Exception, journal: Journal) -> FedsimError:
    """Turn an error into one that other ranks can unpickle.

    fedsim's own are returned unchanged; others carry their traceback as text.
    """
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
    """Kill this process, with status 2, if the block takes longer than ``seconds``."""
    last = threading.Timer(seconds, os._exit, (2,))
    last.daemon = True
    last.start()
    try:
        yield
    finally:
        last.cancel()


@contextmanager
def single_process(journal: Journal) -> Iterator[None]:
    """Context of a run with one process: an error also goes to its log and to ``exit.json``."""
    try:
        yield
    except Exception as error:
        _log_error(error, journal)
        _write_exit_file(error, journal)
        raise
    finally:
        journal.close()


@contextmanager
def multi_process(
    store: dist.Store,
    journal: Journal,
    size: int,
    timeout_s: float,
) -> Iterator[None]:
    """Context of one rank of several: the rank that reports raises its error, the others exit.

    Args:
        store: shared by all ranks.
        timeout_s: seconds that a collective waits.

    Raises:
        LostRankError: in place of a failed collective's error.
        SystemExit: another rank reports.
    """
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if cause is None:
            _log_error(error, journal)
        else:
            journal.write(cause, message=str(error))
        # One rank raises the error, all others exit with a status only.
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
    error: Exception,
    cause: str | None,
    store: dist.Store,
    journal: Journal,
    size: int,
    timeout_s: float,
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
    # A failed collective's own message says little: name the rank to blame instead.
    reported = error
    if cause is not None:
        reported = _lost_rank_error(error, journal, size, timeout_s)
    was_first = _write_exit_file(reported, journal)
    # For a lost rank, or without the store's answer, several ranks may get here: the first reports.
    must_be_first = report is Report.UNKNOWN or cause is not None
    if must_be_first and not was_first:
        return None
    return reported


def exit_now(journal: Journal, number: int, size: int, at_once: bool = False) -> None:
    """Report that a signal ends this process in mid-round, if no rank has written ``exit.json``.

    A launcher also signals the remaining ranks when one has died: then the dead rank is the cause.

    Args:
        at_once: do not wait for what other ranks may still write.
    """
    where = in_words(journal.place) or "the preparation"
    message = (
        f"stopped: {signal_name(number)} came in {where}: what was begun there is done again when "
        "the same command is started"
    )
    journal.write("stopped", message=message)
    reason: Reason = "stopped"
    place: Place = {"rank": journal.rank, **journal.place}
    # A dead rank, if there is one, is the cause and not the signal.
    if size > 1 and not at_once:
        blamed = _blamed(journal, size, None)
        if blamed is not None:
            reason, place = "lost rank", blamed.place
            message = f"error: {blamed.text}; {GOES_ON}"
    if journal.folder is None or write_ending(journal.folder, reason, 128 + number, message, place):
        print(message, file=sys.stderr, flush=True)


def log_signal(journal: Journal, number: int) -> None:
    """Log a signal; for Ctrl-C also print what follows (SIGTERM may be the launcher's own)."""
    journal.write("signal", name=signal_name(number))
    if journal.rank == 0 and number == signal.SIGINT:
        message = (
            f"{signal_name(number)}: the run ends after this round, or where it is in {GRACE_S:g} "
            "s; press Ctrl-C again to end it now"
        )
        print(message, file=sys.stderr, flush=True)


def _log_error(error: Exception, journal: Journal) -> None:
    """Log an error with its place, and an error that is not fedsim's own with its traceback."""
    _set_place(error, journal, error)
    if isinstance(error, FedsimError):
        journal.write("error", message=line_of(error))
    else:
        trace = "".join(traceback.format_exception(error))
        journal.write("error", message=line_of(unforeseen(error)), trace=trace)


def _write_exit_file(error: Exception, journal: Journal) -> bool:
    """Write ``exit.json``; False if another rank wrote it first."""
    if journal.folder is None:
        return True
    if isinstance(error, FedsimError):
        known, status = error, error.status
    else:
        known, status = unforeseen(error), 1
    reason: Reason = "error"
    if isinstance(error, Stopped):
        reason = "stopped"
    elif isinstance(error, LostRankError):
        reason = "lost rank"
    place = known.place or {"rank": journal.rank, **journal.place_of(error)}
    return write_ending(journal.folder, reason, status, line_of(known), place)


def _set_place(error: Exception, journal: Journal, raised: Exception) -> None:
    """Add rank, stage, round and client to an error that neither has them nor names its subject.

    Args:
        raised: the error as it was raised on this rank; the journal knows its place.
    """
    names_its_own = isinstance(error, FedsimError) and not isinstance(error, RunError)
    where = journal.place_of(raised)
    # Configuration and data errors name a key or a file, which a place would not help.
    if where and not names_its_own and not getattr(error, "place", None):
        vars(error)["place"] = {"rank": journal.rank, **where}


def _lost_rank_error(
    error: Exception,
    journal: Journal,
    size: int,
    timeout_s: float,
) -> LostRankError:
    """Error that replaces a failed collective's and names the rank to blame."""
    blamed = _blamed(journal, size, timeout_s)
    if blamed is None:
        said = " ".join(str(error).split())[:200]
        return LostRankError(f"another rank has left ({said}); {GOES_ON}")
    found = LostRankError(f"{blamed.text}; {GOES_ON}")
    found.place = blamed.place
    return found


def _blamed(journal: Journal, size: int, timeout_s: float | None) -> Blame | None:
    """The ranks to blame among the others; None without a run directory, and so without logs."""
    if journal.folder is None:
        return None
    others = [rank for rank in range(size) if rank != journal.rank]
    return blame(journal.folder, others, timeout_s)


def _should_report(store: dist.Store, journal: Journal, size: int) -> Report:
    """Decide whether this failed rank reports: rank 0 if it fails too, else the first that failed.

    A store that does not answer may block for long, so a thread of its own asks it.
    """
    # Stays empty where the store blocks.
    answers: list[Report] = []
    asking = threading.Thread(
        target=lambda: answers.append(_ask_store(store, journal.rank)),
        daemon=True,
    )
    asking.start()
    asking.join(2 * GRANT_S)
    holds_store = journal.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if holds_store:  # the others have yet to ask it
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
    if reports:
        return Report.YES
    return Report.NO


def _keep_store_alive(store: dist.Store, size: int, patience_s: float = 10.0) -> None:
    """Stay until every rank has asked the store of this process, or for ``patience_s`` seconds."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and int(store.add("fedsim/failures", 0)) < size:
        time.sleep(0.05)
