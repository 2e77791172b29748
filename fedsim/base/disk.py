"""Full disk, reported by any library, as one error: which disk, and that nothing done is lost."""

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
def explaining_full_disk(
    folders: Sequence[Path],
    kept: str = "the last finished round",
) -> Iterator[None]:
    """Turn an error of a full disk inside the block into a :class:`DiskFullError`.

    Args:
        folders: whose free space the error names; those that exist.
        kept: the point after which the same command would go on, for the message.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = []
        for folder in folders:
            if folder.exists():
                free.append(f"{shutil.disk_usage(folder).free:,} bytes free at {folder}")
        raise DiskFullError(
            f"the disk has no room for what is to be written ({', '.join(free)}): free space and "
            f"start the same command again; it goes on after {kept}"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or one of its causes, is a full disk or quota."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return True
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # safetensors reports it only in its message.
        if any(f"{os.strerror(number)} (os error {number})" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
