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
    """Parser whose errors are fedsim's, so that only one of several processes prints them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help shows the form")

    def print_help(self, file: Any = None) -> None:
        """Print the help on the first of several processes."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


@steady_terminal()
def launched(read: Callable[[], T], work: Callable[[T], None]) -> int:
    """Run ``work(read())`` and report its error as one line; return the exit status.

    A terminal that is lost meanwhile changes nothing in it.

    Args:
        read: reads the command; it fails alike on every rank.
        work: joins the processes; its error leaves on the first rank that fails, and the others end
            quietly.
    """
    # Read the command: every rank fails in the same way, and one reports it.
    try:
        command = read()
    except FedsimError as error:  # rank 0 reports it, and the launcher ends the others with it
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # seconds
            return 2
        report(error)
        return 2

    # Do the work: the first rank that fails reports it.
    try:
        work(command)
    except FedsimError as error:
        report(error)
        return error.status
    except Exception as error:  # a bug
        # The traceback comes first, so that the cause is the last line. An error in a user's code
        # is one line with its place; the log has its traceback.
        if not user_code.place_of(error):
            traceback.print_exception(error)
        report(unforeseen(error))
        return 1
    return 0


def report(error: FedsimError) -> None:
    """Print the error as one line, and write it to the file from which torchrun reads a cause."""
    print(line_of(error), file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # torchrun takes the earliest error for the root cause: seconds since 1970, one earlier.
        timestamp = int(time.time()) - 1
        message = line_of(error).partition(": ")[2]
        cause = {"message": message, "extraInfo": {"timestamp": timestamp}}
        Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")


def unforeseen(error: Exception) -> FedsimError:
    """Wrap an error that is not fedsim's in a :class:`RunError` with its place."""
    message = f"{type(error).__name__}: {error}"
    if user_code.place_of(error):
        message = user_code.in_words(error)
    found = RunError(message)
    found.place = getattr(error, "place", {})
    return found


def line_of(error: FedsimError) -> str:
    """Return ``error: message (place)``, or ``stopped: …`` for a requested stop.

    A traceback follows if there is one. Several mistakes are as many lines.
    """
    if isinstance(error, Problems):
        return "\n".join(map(line_of, error.errors))
    where = ""
    message_has_place = isinstance(error, LostRankError)
    if error.place and not message_has_place:
        where = f" ({in_words(error.place)})"
    kind = "stopped" if isinstance(error, Stopped) else "error"
    first, end, trace = str(error).partition("\n")
    return f"{kind}: {first}{where}{end}{trace}"
