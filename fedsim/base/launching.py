"""Exit of a launched command: one error line, from one rank, that torchrun records too."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fedsim.base import user_code
from fedsim.base.errors import ConfigError, FedsimError, LostRankError, Problems, RunError, Stopped
from fedsim.base.journal import in_words
from fedsim.base.terminal import steady_terminal

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are fedsim's, so that of several processes one tells them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help shows the form")

    def print_help(self, file: Any = None) -> None:
        """Of several processes the first prints."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


@steady_terminal()
def launched(read: Callable[[], T], work: Callable[[T], None]) -> int:
    """Run ``work(read())``; returns the exit status: an error's own, which is one line; 1 after a bug.

    A terminal that is lost meanwhile changes nothing in it.

    Args:
        read: reads the command; it fails alike on every rank.
        work: joins the processes; its error leaves on the first rank that fails, and the others end quietly.
    """
    try:
        command = read()
    except FedsimError as error:  # rank 0 speaks, and the launcher ends the others with it
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
            return 2
        report(error)
        return 2
    try:
        work(command)
    except FedsimError as error:
        report(error)
        return error.status
    except Exception as error:  # a bug: its traceback comes first, so that the cause is still the last line
        if not user_code.place_of(error):  # of a user's code one line does, with its place; the log has the traceback
            traceback.print_exception(error)
        report(unforeseen(error))
        return 1
    return 0


def report(error: FedsimError) -> None:
    """The error as one line; torchrun, whose own report follows, is told the cause, so that it also ends with it."""
    print(line_of(error), file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {
            "message": line_of(error).partition(": ")[2],
            "extraInfo": {"timestamp": int(time.time()) - 1},
        }  # earliest = root cause
        Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")


def unforeseen(error: Exception) -> FedsimError:
    """An error that is not fedsim's as one that is, at its place."""
    found = RunError(user_code.in_words(error) if user_code.place_of(error) else f"{type(error).__name__}: {error}")
    found.place = getattr(error, "place", {})
    return found


def line_of(error: FedsimError) -> str:
    """``error: what (where)``, a traceback below if there is one; ``stopped: …`` where that was asked for.

    Several mistakes are as many lines.
    """
    if isinstance(error, Problems):
        return "\n".join(map(line_of, error.errors))
    is_told = isinstance(error, LostRankError)  # by the message itself
    where = f" ({in_words(error.place)})" if error.place and not is_told else ""
    first, end, trace = str(error).partition("\n")
    return f"{'stopped' if isinstance(error, Stopped) else 'error'}: {first}{where}{end}{trace}"
