"""A full disk, whichever library met it, as one error that says which disk, and that nothing finished is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedsim.base.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explaining_full_disk(folders: Sequence[Path], kept: str = "the last finished round") -> Iterator[None]:
    """Turn an error of a full disk inside the block into a :class:`DiskFullError` that names ``folders``.

    ``kept`` says after what the same command would go on.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = ", ".join(f"{shutil.disk_usage(f).free:,} bytes free at {f}" for f in folders if f.exists())
        raise DiskFullError(
            f"the disk has no room for what is to be written ({free}): free space and start the same command again; it "
            f"goes on after {kept}"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or its cause, is a full disk or quota (safetensors reports it only in its message)."""
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if any(f"{os.strerror(number)} (os error {number})" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
