"""One session of a run: its ranks as processes of their own, which nobody watches over, so that fedsim has to."""

from __future__ import annotations

import atexit
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedsim.base.processes import family, kill

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "launch" / "run.py"


class HangError(AssertionError):
    """A rank did not end in time."""


class Session:
    """Ranks of ``launch/run.py``, forked from this process, so that the imports are paid for once.

    Args:
        words: of the command line.
        size: number of ranks.
        log: file that takes what all ranks print.
    """

    def __init__(self, words: Sequence[str], size: int, log: Path) -> None:
        self.log = log
        self.codes: dict[int, int] = {}
        port = _free_port()
        self.pids = [_fork(words, rank, size, port, log) for rank in range(size)]

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL to some ranks and to what they have started."""
        for rank in ranks:
            kill(family(self.pids[rank]))

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def wait(self, timeout_s: float) -> float:
        """Seconds until all ranks have ended.

        Raises:
            HangError: some have not within ``timeout_s``; they are killed.
        """
        began = time.monotonic()
        while left := self.running():
            if time.monotonic() - began > timeout_s:
                self.kill(left)
                raise HangError(f"ranks {left} did not end within {timeout_s:g} s; see {self.log}")
            time.sleep(0.01)
        return time.monotonic() - began

    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.startswith("error:")]


def _fork(words: Sequence[str], rank: int, size: int, port: int, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ.update(place, WORLD_SIZE=str(size))
        sys.argv = [str(ENTRY), *words]
        runpy.run_path(str(ENTRY), run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with suppress(Exception):
            atexit._run_exitfuncs()  # what an interpreter does at its end, without this process's own frames
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
