"""One run at a time in a directory: not even the last processes of a killed session may still be writing there.

Both locks are the kernel's (``flock``): they end with their process, however it ends.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from fedsim.base.errors import ConfigError, RunError

PATIENCE_S: Final = 60.0
"""How long a new session waits for the ranks of the one before to end; they leave by themselves when one is missed."""


DYING_S: Final = 5.0
"""How long a new session waits for rank 0 of the one before, which may have been killed a moment ago: the kernel gives
its lock back only when its memory has been freed."""


class DirectoryLock:
    """The locks of one rank on a run directory.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[IO[str]] = []

    def hold(self, say: Callable[[str], None], patience_s: float = PATIENCE_S, dying_s: float = DYING_S) -> None:
        """On rank 0: make the directory this run's own, and wait until no rank of an earlier session is left.

        Args:
            say: told if there is something to wait for.
            patience_s: how long other ranks of an earlier session are waited for, in seconds.
            dying_s: how long its rank 0 is waited for.

        Raises:
            ConfigError: another run holds it, or ranks of an earlier session do not end.
            OSError: the directory cannot be written.
        """
        deadline = time.monotonic() + dying_s
        while not (held := self._lock(".lock", fcntl.LOCK_EX)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not held:
            raise ConfigError(
                f"{self.folder}: another process is running this very run; wait for it, or give this one another name "
                "(name=...)"
            )
        deadline, waiting = time.monotonic() + patience_s, False
        while not self._lock(".ranks", fcntl.LOCK_EX):
            if not waiting:
                say("waiting for processes of an earlier session, which still hold the run's directory, to end")
                waiting = True
            if time.monotonic() > deadline:
                self.release()
                raise ConfigError(
                    f"{self.folder}: processes of an earlier session of this run have not ended in {patience_s:g} s; "
                    "end them, and start the same command again"
                )
            time.sleep(0.1)
        self._files.pop().close()

    def join(self) -> None:
        """On every rank, once :meth:`hold` has returned: be one of those for whom a later session waits.

        Raises:
            RunError: rank 0 is gone, and another session was quicker.
        """
        if not self._lock(".ranks", fcntl.LOCK_SH):
            raise RunError(f"{self.folder}: another session has taken it, as this one's rank 0 has ended")

    def release(self) -> None:
        """Give up all that is held."""
        while self._files:
            self._files.pop().close()

    def _lock(self, name: str, kind: int) -> bool:
        file = (self.folder / name).open("a")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files.append(file)
        return True
