"""Processes of this machine: those below one, their end, and what state they are in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it, also those in sessions of their own; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to whoever is left of them; another process that has got the number of one is spared."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def state_of(pid: int) -> Literal["gone", "stopped", "alive"]:
    """What a process does; one that has ended and that nobody has waited for is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "gone"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"
