"""How a launched command ends: with one error line, from one rank, that torchrun knows too."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fedsim.errors import ConfigError, FedsimError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are fedsim's, so that of several processes one tells them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help shows the form")

    def print_help(self, file: Any = None) -> None:
        """Of several processes the first prints."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def launched(read: Callable[[], T], work: Callable[[T], None]) -> int:
    """Run ``work(read())``; returns the exit status, 2 after a user's error, which is one line.

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
        return 2
    return 0


def report(error: FedsimError) -> None:
    """The error as one line; torchrun, whose own report follows, is told the cause, so that it also ends with it."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": str(error), "extraInfo": {"timestamp": int(time.time()) - 1}}  # earliest = root cause
        Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")
