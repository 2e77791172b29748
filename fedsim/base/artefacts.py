"""Content-addressed store of results that runs share, keyed by a hash of all they depend on.

An artefact is a folder ``<kind>-<hash>`` whose note ``artefact.json`` lists its dependencies
(:func:`write_note`). It is published by one atomic rename, so a half-written one is never seen; a
damaged one is built again. The hash covers the kind's ``VERSION``, a number beside the code that
makes it. A change of what the code computes must raise it; ``tests/test_artefact_versions.py``
fails where that was forgotten. The note also names the fedsim that made it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from fedsim.base.digests import FileDigests, file_digest
from fedsim.base.errors import CheckpointError
from fedsim.base.journal import Journal
from fedsim.base.json_text import parse_json
from fedsim.base.ranks import Ranks
from fedsim.base.version import made_by, maker

T = TypeVar("T")

NOTE: Final = "artefact.json"
SEAL: Final = "sha256"

SOFTWARE = {"version": "version of what makes it", "versions": "version of a package"}
"""Dependencies that are software, in words.

Artefacts that differ in nothing else are of the same data and settings.
"""


@dataclass(frozen=True)
class Artefact:
    """A finished artefact.

    Attributes:
        folder: its files.
        reused: it was there already.
    """

    folder: Path
    reused: bool


class ArtefactStore:
    """Artefacts under one folder, shared by all ranks and runs of a machine.

    Args:
        folder: made if absent.
        ranks: rank 0 looks up and writes; all ranks may share the work of building.
        log: gets a line for what is built or reused.
        journal: gets the stage in which this rank builds.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        log: Callable[[str], None],
        journal: Journal | None = None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.log = log
        self.journal = Journal(ranks.rank) if journal is None else journal
        self.digests = FileDigests(folder)

    def get(
        self,
        kind: str,
        depends: Mapping[str, Any],
        version: int,
        build: Callable[[], T],
        write: Callable[[Path, T], None],
    ) -> Artefact:
        """Return the artefact of these dependencies, built by all ranks if it is not there.

        Args:
            kind: such as "guard-verdicts"; part of the folder's name.
            depends: JSON-able values that decide the content: config parts, file and model hashes.
            version: of the code that computes it; raised with every change of its results.
            build: called on every rank; only rank 0's result is written.
            write: called on rank 0 with an empty folder and the result.
        """
        # The folder's name is a hash of all that decides the content.
        facts = {**depends, "version": version}
        folder = self.folder / f"{kind}-{digest_of(facts)[:16]}"

        # Rank 0 looks; every rank gets the answer, so that all take the same way.
        if self.ranks.once(lambda: self._intact(folder)):
            self.log(f"{kind}: reused {folder}")
            return Artefact(folder, reused=True)
        outdated = self.ranks.once(lambda: self._outdated(kind, facts))
        if outdated is not None:
            self.log(f"{kind}: {outdated}")

        # All ranks build, rank 0 writes.
        with self.journal.at(stage=f"making {kind}"):
            result = build()
        with self.journal.at(stage=f"writing {kind}"):
            self.ranks.once(lambda: self._publish(folder, facts, result, write))
        self.log(f"{kind}: written to {folder}")
        return Artefact(folder, reused=False)

    def _intact(self, folder: Path) -> bool:
        """Check that an artefact is there and as it was written; a damaged one is logged."""
        if not (folder / NOTE).is_file():
            return False
        try:
            note = parse_json((folder / NOTE).read_text(encoding="utf-8"))
            check_note(folder / NOTE, note)
            is_intact = note["name"] == folder.name
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_intact = False
        if not is_intact:
            self.log(f"{folder} is damaged: it is built again")
        return is_intact

    def _outdated(self, kind: str, facts: Mapping[str, Any]) -> str | None:
        """Explain why an artefact of the same data and settings does not fit; None without one."""
        wanted = json_form(facts)
        for note in sorted(self.folder.glob(f"{kind}-*/artefact.json")):
            try:
                found = parse_json(note.read_text(encoding="utf-8"))
                depends = dict(found["depends"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged, or no artefact
            changed = set()
            for name in depends.keys() | wanted.keys():
                if depends.get(name) != wanted.get(name):
                    changed.add(name)
            if changed and changed <= SOFTWARE.keys():
                what = " and ".join(SOFTWARE[name] for name in sorted(changed))
                made = maker(found.get("made_by"))
                reason = f"was made by {made}, with another {what}"
                return f"{note.parent} {reason}; it stays, and a new one is built"
        return None

    def _publish(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        result: T,
        write: Callable[[Path, T], None],
    ) -> None:
        """Write into a hidden folder beside the final one, sync it, and rename it into place."""
        partial = self.folder / f".{folder.name}.{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            write(partial, result)
            note = {"name": folder.name, "depends": facts, "made_by": made_by()}
            write_note(partial / NOTE, note)
            sync_folder(partial)
            self._place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, partial: Path, folder: Path) -> None:
        """Rename into place, unless another run has published an intact artefact first.

        That one stays, since it may be in use; a damaged one is moved aside and deleted.
        """
        while True:
            try:
                os.rename(partial, folder)
                return
            except OSError as error:
                # A rename does not replace a folder that holds files.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self._intact(folder):
                return
            # Move the damaged one away, and try again.
            aside = folder.with_name(f".{folder.name}.damaged.{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):  # another run has moved it already
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)


def write_note(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON file of ``facts``, the SHA-256 of each file beside it, and its :data:`SEAL`."""
    files = {}
    for file in sorted(path.parent.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(path.parent))] = file_digest(file)
    content = json_form({**facts, "files": files})
    write_json(path, {**content, SEAL: digest_of(content)})


def check_note(path: Path, note: Mapping[str, Any]) -> None:
    """Check that a note of :func:`write_note` and the files beside it are unchanged.

    Args:
        path: of the note.
        note: its content, as it was read.

    Raises:
        CheckpointError: a file has changed or is missing; names it.
    """
    sealed = {name: value for name, value in note.items() if name != SEAL}
    if digest_of(sealed) != note.get(SEAL):
        raise CheckpointError(f"{path}: does not match its SHA-256")
    for file, digest in note["files"].items():
        if file_digest(path.parent / file) != digest:
            raise CheckpointError(f"{path.parent / file}: does not match its SHA-256")


def json_form(value: Any) -> Any:
    """Return a JSON-able value as it is read back: tuples become lists, and keys become texts."""
    return json.loads(json.dumps(value))


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself, to disk."""
    for path in [*folder.rglob("*"), folder]:  # a folder is synced for the names in it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
