"""The folders that a run writes into: whether they can be made and written, and whether the disk has room."""

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
        folder: the nearest existing one, which tells the disk.
    """

    needed: int
    there: int
    free: int
    folder: Path


def check_folder(folder: Path, setting: str) -> None:
    """Check that ``folder`` can be made, if it is not there, and written; nothing is written.

    Args:
        setting: the key and value that name it, for the error.

    Raises:
        FolderError: it cannot.
    """
    try:
        folder.stat()  # also fails where a folder above it is a file
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(folder, setting, error.strerror or type(error).__name__) from error
    above = nearest_existing(folder)
    new = folder.absolute().relative_to(above).parts
    if any(len(os.fsencode(part)) > os.pathconf(above, "PC_NAME_MAX") for part in new):
        raise _unusable(folder, setting, os.strerror(errno.ENAMETOOLONG))
    if not above.is_dir():
        raise _unusable(folder, setting, f"{above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unusable(folder, setting, f"{above} may not be written")


def check_disk(config: Config, adapter_size: int, cohort: int) -> DiskRoom:
    """How much the run keeps on its disk, and whether it fits.

    Each checkpoint has the adapter and the server's vectors; one more than is kept is there while the oldest goes.
    Control variates: every client's newest, those that older checkpoints name, and a round's own before it counts,
    which are num_clients + cohort · keep_checkpoints at most. A short run has fewer.

    Args:
        adapter_size: numbers of the adapter, in fp32.
        cohort: clients of a round.

    Raises:
        ConfigError: it does not fit.
    """
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    keep, rounds = config.record.keep_checkpoints, config.federation.num_rounds
    vectors = (1 + len(algorithm.vector_names)) * min(keep + 1, rounds) + 1
    if algorithm.has_control:
        vectors += config.federation.num_clients + cohort * min(keep, rounds)
    run, folder = config.folder, nearest_existing(config.folder)
    room = DiskRoom(4 * adapter_size * vectors, _written(run), shutil.disk_usage(folder).free, folder)
    if room.needed - room.there > room.free:
        raise ConfigError(
            f"record.dir={config.record.dir!r}: the run keeps up to {byte_size(room.needed)} and "
            f"{byte_size(room.free)} are free on the disk of {folder}; free space, or give a directory on another disk"
        )
    return room


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _written(run: Path) -> int:
    """Bytes of the checkpoints, control variates and final adapter that are there."""
    files = [
        file for part in ("checkpoints", "client_state", "adapter") for file in (run / part).rglob("*.safetensors")
    ]
    return sum(file.stat().st_size for file in files)


def _unusable(folder: Path, setting: str, reason: str) -> FolderError:
    return FolderError(f"{setting}: {folder} cannot be made or written ({reason}); give another directory")
