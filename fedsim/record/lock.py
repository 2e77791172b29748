"""Locks of a run directory: one run at a time, and no process of an earlier session is left.

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
"""Seconds that a new session waits for the ranks of the one before to end.

They leave by themselves when one of them is missed.
"""

DYING_S: Final = 5.0
"""Seconds that a new session waits for rank 0 of the one before, which may just have been killed.

The kernel releases its lock only when its memory has been freed.
"""


class DirectoryLock:
    """The locks of one rank on a run directory.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[IO[str]] = []

    def hold(
        self,
        say: Callable[[str], None],
        patience_s: float = PATIENCE_S,
        dying_s: float = DYING_S,
    ) -> None:
        """Take the directory for this run (on rank 0), and wait for ranks of an earlier session.

        Args:
            say: called with a line if there is something to wait for.
            patience_s: longest wait for other ranks of an earlier session, in seconds.
            dying_s: longest wait for its rank 0, in seconds.

        Raises:
            ConfigError: another run holds it, or ranks of an earlier session do not end.
            OSError: the directory cannot be written.
        """
        # Rank 0's own lock, which is kept.
        deadline = time.monotonic() + dying_s
        while not self._lock(".lock", fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{self.folder}: another process is running this very run; wait for it, or "
                    "give this one another name (name=...)"
                )
            time.sleep(0.1)
        # The lock that all ranks share: it is free once no rank of an earlier session is left.
        deadline, waiting = time.monotonic() + patience_s, False
        while not self._lock(".ranks", fcntl.LOCK_EX):
            if not waiting:
                session = "processes of an earlier session, which still hold the run's directory"
                say(f"waiting for {session}, to end")
                waiting = True
            if time.monotonic() > deadline:
                self.release()
                raise ConfigError(
                    f"{self.folder}: processes of an earlier session of this run have not ended "
                    f"in {patience_s:g} s; end them, and start the same command again"
                )
            time.sleep(0.1)
        self._files.pop().close()  # all ranks take it in join()

    def join(self) -> None:
        """Take the lock that all ranks share, so that a later session waits for this rank.

        Called on every rank once :meth:`hold` has returned.

        Raises:
            RunError: rank 0 is gone, and another session was quicker.
        """
        if not self._lock(".ranks", fcntl.LOCK_SH):
            reason = "as this one's rank 0 has ended"
            raise RunError(f"{self.folder}: another session has taken it, {reason}")

    def release(self) -> None:
        """Release all locks that are held."""
        while self._files:
            self._files.pop().close()

    def _lock(self, name: str, kind: int) -> bool:
        """Try to take a lock without waiting; returns False if another process holds it."""
        file = (self.folder / name).open("a")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files.append(file)
        return True
