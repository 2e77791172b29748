"""Checks of the folders that a run writes into: permissions and disk space."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedsim.base.errors import ConfigError, FolderError
from fedsim.base.tables import byte_size
from fedsim.config import Config
from fedsim.federation.algorithms import build_algorithm


@dataclass(frozen=True)
class DiskRoom:
    """Space of the run directory.

    Attributes:
        needed: bytes that checkpoints, control variates and the final adapter take at most.
        there: bytes of them that a run to be resumed has written already.
        free: bytes free on the disk.
        folder: the nearest existing one, which lies on that disk.
    """

    needed: int
    there: int
    free: int
    folder: Path


def check_folder(folder: Path, setting: str) -> None:
    """Check that ``folder`` can be made, if it does not exist, and written; nothing is written.

    Args:
        setting: the key and value that name it, for the error.

    Raises:
        FolderError: it cannot be made or written.
    """
    try:
        folder.stat()  # also fails where a folder above it is a file
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(folder, setting, error.strerror or type(error).__name__) from error
    # The folders to make, and the one that they are made in.
    above = nearest_existing(folder)
    new = folder.absolute().relative_to(above).parts
    if any(len(os.fsencode(part)) > os.pathconf(above, "PC_NAME_MAX") for part in new):
        raise _unusable(folder, setting, os.strerror(errno.ENAMETOOLONG))
    if not above.is_dir():
        raise _unusable(folder, setting, f"{above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unusable(folder, setting, f"{above} may not be written")


def check_disk(config: Config, adapter_size: int, cohort: int) -> DiskRoom:
    """Check that the run's checkpoints, control variates and final adapter fit on its disk.

    Each checkpoint has the adapter and the server's vectors; one more than is kept exists while the
    oldest is removed. Control variates are every client's newest, those that older checkpoints
    name, and a round's own before it counts, which are num_clients + cohort · keep_checkpoints at
    most. A short run has fewer.

    Args:
        adapter_size: numbers of the adapter, in fp32.
        cohort: clients of a round.

    Raises:
        ConfigError: it does not fit.
    """
    # Vectors of the adapter's size, in fp32 (4 bytes a number); the last one is the final adapter.
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    keep, rounds = config.record.keep_checkpoints, config.federation.num_rounds
    vectors = (1 + len(algorithm.vector_names)) * min(keep + 1, rounds) + 1
    if algorithm.has_control:
        vectors += config.federation.num_clients + cohort * min(keep, rounds)
    needed = 4 * adapter_size * vectors  # bytes
    folder = nearest_existing(config.folder)
    room = DiskRoom(needed, _written(config.folder), shutil.disk_usage(folder).free, folder)
    if room.needed - room.there > room.free:
        raise ConfigError(
            f"record.dir={config.record.dir!r}: the run keeps up to {byte_size(room.needed)} and "
            f"{byte_size(room.free)} are free on the disk of {folder}; free space, or give a "
            "directory on another disk"
        )
    return room


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def _written(run: Path) -> int:
    """Count the bytes of the checkpoints, control variates and final adapter that exist."""
    num_bytes = 0
    for part in ("checkpoints", "client_state", "adapter"):
        for file in (run / part).rglob("*.safetensors"):
            num_bytes += file.stat().st_size
    return num_bytes


def _unusable(folder: Path, setting: str, reason: str) -> FolderError:
    problem = f"{folder} cannot be made or written ({reason})"
    return FolderError(f"{setting}: {problem}; give another directory")
