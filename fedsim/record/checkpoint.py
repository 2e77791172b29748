"""One checkpoint per round: everything that the next round starts from.

A checkpoint is a folder that appears by one rename and carries the SHA-256 of all that is in it. Loading takes the
newest whole one and says which damaged ones it passed over. There is no generator state: every draw comes from its key.
Another version's is resumed from only if its format is this one's.
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
"""To be raised with every change of what a checkpoint holds or means; 3: rounds are counted from 1."""


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
        seconds_per_token: learned cost of each rank; may have another length if the world size has changed.
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
        """Write a checkpoint; drop those beyond ``keep``, and newer ones: damaged, and done anew from here on."""
        final = self.folder / _name(checkpoint.round_idx)
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write(partial, checkpoint)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
        folders = self._folders()
        end = folders.index(final) + 1
        for other in [*folders[: max(end - self.keep, 0)], *folders[end:]]:
            shutil.rmtree(other)

    @staticmethod
    def _write(partial: Path, checkpoint: Checkpoint) -> None:
        partial.mkdir(parents=True)
        tensors = {name: vector.detach().cpu().contiguous() for name, vector in checkpoint.state.named().items()}
        write_tensors(partial / "state.safetensors", tensors)
        note = {
            "format": FORMAT,
            "made_by": made_by(),
            "round": round_number(checkpoint.round_idx),
            "num_server_steps": checkpoint.state.num_steps,
            "client_rounds": {str(c): round_number(r) for c, r in checkpoint.client_rounds.items()},
            "seconds_per_token": list(checkpoint.seconds_per_token),
        }
        write_note(partial / NOTE, note)
        sync_folder(partial)

    def load(
        self, say: Callable[[str], None], check: Callable[[Checkpoint], None] = lambda checkpoint: None
    ) -> Checkpoint | None:
        """The newest whole checkpoint, or None if the run has none.

        Args:
            say: hears of damaged ones, and which other fedsim wrote the one that is loaded.
            check: raises CheckpointError where a checkpoint is whole but of no use: something that it names elsewhere
                is damaged, or its vectors do not fit the algorithm.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or one is of another format.
        """
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
        for passed in damaged:
            is_next = found is not None and passed is damaged[-1]
            say(f"{passed}; {'the one before it is used' if is_next else 'it is passed over'}")
        if damaged and found is None:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged; start anew under another name")
        return found

    def any(self) -> bool:
        """Return whether a round has been finished."""
        return bool(self._folders())

    def read(self, round_idx: int) -> Checkpoint:
        """The checkpoint of a round.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return _read(self.folder / _name(round_idx))

    def kept_client_rounds(self) -> list[Mapping[int, int]]:
        """Client indices of all checkpoints, to know which control variates are still needed.

        Only the notes are read: a checkpoint's vectors are of no interest here, and checking them would take as long as
        writing them has.
        """
        indices: list[Mapping[int, int]] = []
        for folder in self._folders():
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged or foreign: needs none
                note = _note(folder)
                _check_format(folder, note)
                indices.append(_client_rounds(note))
        return indices

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("round-*")) if self.folder.is_dir() else []


def _name(round_idx: int) -> str:
    return f"round-{round_number(round_idx):06d}"


def _checked(folder: Path, check: Callable[[Checkpoint], None]) -> Checkpoint:
    found = _read(folder)
    try:
        check(found)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return found


def _read(folder: Path) -> Checkpoint:
    try:
        note = _note(folder)
        if SEAL not in note:  # as in the formats before 2
            _check_format(folder, note)
        check_note(folder / NOTE, note)
        _check_format(folder, note)
        round_idx = round_index(int(note["round"]))
        if folder.name != _name(round_idx):
            raise CheckpointError(f"{folder}: holds the checkpoint {_name(round_idx)}")
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
    """A round that another fedsim computed may differ from what this one would have computed."""
    wrote = maker(_note(folder).get("made_by"))
    if wrote != (this := maker(made_by())):
        say(f"{folder} was written by {wrote}; {this} goes on")


def _check_format(folder: Path, note: Mapping[str, Any]) -> None:
    """Refuse a note of another format; the first ones had no number, and formats before 3 hold ``round_idx``."""
    number = note["round"] if "round" in note else note["round_idx"]
    if isinstance(number, int) and (found := note.get("format", 0)) != FORMAT:
        raise OtherFormatError(
            f"{folder}: was written by {maker(note.get('made_by'))} in format {found!r}, and this is "
            f"{maker(made_by())} with format {FORMAT}; go on with the fedsim that wrote it (check out its commit), or "
            "start anew under another name (name=...)"
        )


def _note(folder: Path) -> dict[str, Any]:
    note: dict[str, Any] = parse_json((folder / NOTE).read_text(encoding="utf-8"))
    return note


def _client_rounds(note: Mapping[str, Any]) -> dict[int, int]:
    return {int(c): round_index(int(r)) for c, r in note["client_rounds"].items()}
