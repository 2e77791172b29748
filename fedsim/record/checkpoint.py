"""One checkpoint per round: everything that the next round starts from.

A checkpoint is a folder that is published by one atomic rename and carries the SHA-256 of all that
is in it. Loading takes the newest whole one and names the damaged ones that it passed over. There
is no generator state: every draw comes from its key. Another version's checkpoint is resumed from
only if its format is this one's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedsim.base.artefacts import SEAL, check_note, sync_folder, write_note
from fedsim.base.errors import CheckpointError
from fedsim.base.json_text import parse_json
from fedsim.base.rounds import round_index, round_number
from fedsim.base.tensor_file import write_tensors
from fedsim.base.version import made_by, maker
from fedsim.federation.algorithms import ADAPTER, ServerState

FORMAT = 3
"""Version of what a checkpoint holds and means; 3: rounds are counted from 1.

Raise it with every change of that.
"""


class OtherFormatError(CheckpointError):
    """A checkpoint is whole, but written by a fedsim whose checkpoints mean something else."""


NOTE: Final = "checkpoint.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State after a round.

    Attributes:
        round_idx: index of the last finished round.
        state: the server's vectors.
        client_rounds: client → round index of its newest control variate.
        seconds_per_token: learned cost of each rank; may have another length if the world size has
            changed.
    """

    round_idx: int
    state: ServerState
    client_rounds: Mapping[int, int] = field(default_factory=dict)
    seconds_per_token: tuple[float, ...] = ()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: made on the first save.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; drop those beyond ``keep``, and newer ones.

        Newer ones are damaged: the run has resumed from before them, and repeats their rounds.
        """
        # Write a folder under another name, and rename it once it is whole.
        final = self.folder / _name(checkpoint.round_idx)
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write(partial, checkpoint)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
        # Keep the ``keep`` newest ones up to this one.
        folders = self._folders()
        end = folders.index(final) + 1
        for other in [*folders[: max(end - self.keep, 0)], *folders[end:]]:
            shutil.rmtree(other)

    @staticmethod
    def _write(partial: Path, checkpoint: Checkpoint) -> None:
        """Write the files of a checkpoint into the new folder ``partial``, and sync them."""
        partial.mkdir(parents=True)
        tensors = {}  # fp32 vectors by name
        for name, vector in checkpoint.state.named().items():
            tensors[name] = vector.detach().cpu().contiguous()
        write_tensors(partial / "state.safetensors", tensors)
        client_rounds = checkpoint.client_rounds.items()
        note = {
            "format": FORMAT,
            "made_by": made_by(),
            "round": round_number(checkpoint.round_idx),
            "num_server_steps": checkpoint.state.num_steps,
            "client_rounds": {str(c): round_number(r) for c, r in client_rounds},
            "seconds_per_token": list(checkpoint.seconds_per_token),
        }
        write_note(partial / NOTE, note)
        sync_folder(partial)

    def load(
        self,
        say: Callable[[str], None],
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> Checkpoint | None:
        """Load the newest whole checkpoint, or None if the run has none.

        Args:
            say: called with a line about each damaged one, and about another fedsim that wrote the
                one that is loaded.
            check: raises CheckpointError where a checkpoint is whole but of no use: something that
                it names elsewhere is damaged, or its vectors do not fit the algorithm.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or one is of another format.
        """
        # The newest one that can be read and used.
        found: Checkpoint | None = None
        damaged: list[CheckpointError] = []
        for folder in reversed(self._folders()):
            try:
                found = _checked(folder, check)
                _say_maker(folder, say)
                break
            except OtherFormatError:
                raise  # falling back would lose rounds that are whole
            except CheckpointError as error:
                damaged.append(error)
        # Name the damaged ones, newest first.
        for passed in damaged:
            if found is not None and passed is damaged[-1]:
                say(f"{passed}; the one before it is used")
            else:
                say(f"{passed}; it is passed over")
        if damaged and found is None:
            fix = "start again under another name"
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged; {fix}")
        return found

    def any(self) -> bool:
        """Return whether a round has been finished."""
        return bool(self._folders())

    def read(self, round_idx: int) -> Checkpoint:
        """Read the checkpoint of a round.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return _read(self.folder / _name(round_idx))

    def kept_client_rounds(self) -> list[Mapping[int, int]]:
        """Client rounds of all checkpoints, to find the control variates that are still needed.

        Only the notes are read: checking a checkpoint's vectors takes as long as writing them.

        Returns:
            For each checkpoint: client → round index of its newest control variate.
        """
        indices: list[Mapping[int, int]] = []
        for folder in self._folders():
            # One that is damaged or of another format needs none.
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                note = _note(folder)
                _check_format(folder, note)
                indices.append(_client_rounds(note))
        return indices

    def _folders(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("round-*"))


def _name(round_idx: int) -> str:
    return f"round-{round_number(round_idx):06d}"


def _checked(folder: Path, check: Callable[[Checkpoint], None]) -> Checkpoint:
    """Read a checkpoint and check it; errors name its folder."""
    found = _read(folder)
    try:
        check(found)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return found


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking the SHA-256 of its files.

    Raises:
        OtherFormatError: it is of another format.
        CheckpointError: it is damaged.
    """
    try:
        # The note, and the files against its digests.
        note = _note(folder)
        if SEAL not in note:  # as in the formats before 2
            _check_format(folder, note)
        check_note(folder / NOTE, note)
        _check_format(folder, note)
        round_idx = round_index(int(note["round"]))
        if folder.name != _name(round_idx):
            raise CheckpointError(f"{folder}: holds the checkpoint {_name(round_idx)}")
        # The state.
        tensors: dict[str, torch.Tensor] = load_file(str(folder / "state.safetensors"))
        return Checkpoint(
            round_idx,
            ServerState(tensors.pop(ADAPTER), tensors, int(note["num_server_steps"])),
            _client_rounds(note),
            tuple(float(s) for s in note["seconds_per_token"]),
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def _say_maker(folder: Path, say: Callable[[str], None]) -> None:
    """Name another fedsim that wrote a checkpoint: this one may have computed another round."""
    wrote, this = maker(_note(folder).get("made_by")), maker(made_by())
    if wrote != this:
        say(f"{folder} was written by {wrote}; {this} goes on")


def _check_format(folder: Path, note: Mapping[str, Any]) -> None:
    """Refuse a note of another format.

    The first format has no number, and formats before 3 hold ``round_idx``.

    Raises:
        OtherFormatError: the format is another one.
        KeyError: it is no checkpoint's note.
    """
    number = note["round"] if "round" in note else note["round_idx"]
    found = note.get("format", 0)
    if isinstance(number, int) and found != FORMAT:
        wrote, this = maker(note.get("made_by")), maker(made_by())
        raise OtherFormatError(
            f"{folder}: was written by {wrote} in format {found!r}, and this is {this} with format "
            f"{FORMAT}; go on with the fedsim that wrote it (check out its commit), or start again "
            "under another name (name=...)"
        )


def _note(folder: Path) -> dict[str, Any]:
    note: dict[str, Any] = parse_json((folder / NOTE).read_text(encoding="utf-8"))
    return note


def _client_rounds(note: Mapping[str, Any]) -> dict[int, int]:
    return {int(c): round_index(int(r)) for c, r in note["client_rounds"].items()}
