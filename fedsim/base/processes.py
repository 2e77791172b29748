"""Processes of this machine: a process with its descendants, their end and their state."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, also those in other sessions; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL to those that still run; psutil ignores a reused PID."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def state_of(pid: int) -> Literal["gone", "stopped", "alive"]:
    """State of a process; a zombie is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "gone"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"
