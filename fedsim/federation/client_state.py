"""Control variates of clients between rounds: one file per client and round, memory-mapped.

A round writes new files and never touches old ones, so a run that stops in a round resumes from the
files that its last checkpoint names. Any rank can train any client in any round. safetensors gives
a tensor over a private map of the file (writing to it does not change the file), so that memory
holds only the clients in use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedsim.base.errors import CheckpointError
from fedsim.base.rounds import round_number
from fedsim.base.tensor_file import write_tensors


class ClientStateStore:
    """c_i of every client that has trained, on disk.

    Args:
        folder: made if absent.
        index: client → round index of its newest file; taken from a checkpoint on resume.
    """

    def __init__(self, folder: Path, index: Mapping[int, int] | None = None) -> None:
        self.folder = folder
        self.index = dict(index or {})
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, client: int) -> torch.Tensor | None:
        """c_i (fp32 ``[size]``, CPU), or None for a client that has never trained (c_i = 0).

        Raises:
            CheckpointError: the client's file is missing or damaged, or holds another type.
        """
        if client not in self.index:
            return None
        return self._read(client, self.index[client])

    def check(self, index: Mapping[int, int], size: int) -> None:
        """Read every file that ``index`` names.

        Args:
            size: length of the adapter, and so of a control variate.

        Raises:
            CheckpointError: one of them is missing, damaged, or of another type or shape.
        """
        for client, round_idx in index.items():
            vector = self._read(client, round_idx)
            if vector.shape != (size,):
                raise CheckpointError(
                    f"{self._path(client, round_idx)}: control variate of client {client} has "
                    f"shape {list(vector.shape)}, not [{size}]"
                )

    def save(self, client: int, round_idx: int, control: torch.Tensor) -> None:
        """Write c_i of a round by one atomic rename; :meth:`advance` makes it the newest."""
        path = self._path(client, round_idx)
        # Written beside its final name and renamed, so that a kill leaves no half file there.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        vector = control.detach().cpu().contiguous()
        write_tensors(partial, {"control": vector}, {"blake2b": _digest(vector, path.name)})
        # On disk before the rename: a checkpoint will name it.
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)

    def advance(self, clients: Iterable[int], round_idx: int) -> None:
        """Make the files of ``round_idx`` these clients' newest."""
        self.index.update({client: round_idx for client in clients})

    def drop_unused(self, indices: Iterable[Mapping[int, int]]) -> None:
        """Delete the files that no index names.

        Args:
            indices: of the kept checkpoints: client → round index of its file.
        """
        kept = set()
        for index in indices:
            for client, round_idx in index.items():
                kept.add(_file_name(client, round_idx))
        # Partial files of a killed process go too.
        for name in os.listdir(self.folder):
            if name not in kept:
                (self.folder / name).unlink(missing_ok=True)

    def _read(self, client: int, round_idx: int) -> torch.Tensor:
        """Map a client's file of a round and check its type and checksum."""
        path = self._path(client, round_idx)
        named = f"{path}: control variate of client {client}"
        try:
            with safe_open(str(path), framework="pt") as file:
                vector: torch.Tensor = file.get_tensor("control")
                written = (file.metadata() or {}).get("blake2b")
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{named} cannot be read ({error})") from error
        # The right type, and the bytes that were written.
        if vector.dtype != torch.float32:
            raise CheckpointError(f"{named} is {vector.dtype}, not torch.float32")
        if written != _digest(vector, path.name):
            raise CheckpointError(f"{named} does not match its checksum")
        return vector

    def _path(self, client: int, round_idx: int) -> Path:
        return self.folder / _file_name(client, round_idx)


def _file_name(client: int, round_idx: int) -> str:
    return f"client{client:06d}-round{round_number(round_idx):06d}.safetensors"


def _digest(vector: torch.Tensor, name: str) -> str:
    """BLAKE2b checksum of a vector, keyed by its file's name.

    The key makes the checksum of another client's or round's file differ.
    """
    # The bytes are hashed in place: a copy would hold a second control variate in memory.
    return hashlib.blake2b(vector.numpy().data, digest_size=16, key=name.encode()).hexdigest()
