"""Results that runs share: written once under a hash of everything they depend on, reused by whoever needs them.

An artefact is a folder ``<kind>-<hash>`` whose note ``artefact.json`` says what it depends on (:func:`write_note`).
It is published by one atomic rename, so a half-written one is never seen; a damaged one is built again. The hash covers
the kind's ``VERSION``, a number beside the code that makes it: whoever changes what the code computes raises it, and
``tests/test_artefact_versions.py`` fails where that was forgotten. The note also names the fedsim that made it.
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
"""Dependencies that are software, in words: artefacts that differ in these alone are of the same data and settings."""


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
        log: told what is built or reused.
        journal: told what this rank is building.
    """

    def __init__(self, folder: Path, ranks: Ranks, log: Callable[[str], None], journal: Journal | None = None) -> None:
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
        """The artefact of these dependencies, built by all ranks if it is not there.

        Args:
            kind: such as "guard-verdicts"; part of the folder's name.
            depends: JSON-able values that decide the content: config parts, file and model hashes.
            version: of the code that computes it; raised with every change of its results.
            build: called on every rank; only rank 0's result is written.
            write: called on rank 0 with an empty folder and the result.
        """
        facts = {**depends, "version": version}
        folder = self.folder / f"{kind}-{digest_of(facts)[:16]}"
        if self.ranks.once(lambda: self._intact(folder)):
            self.log(f"{kind}: reused {folder}")
            return Artefact(folder, reused=True)
        if (why := self.ranks.once(lambda: self._outdated(kind, facts))) is not None:
            self.log(f"{kind}: {why}")
        with self.journal.at(stage=f"making {kind}"):
            result = build()
        with self.journal.at(stage=f"writing {kind}"):
            self.ranks.once(lambda: self._publish(folder, facts, lambda partial: write(partial, result)))
        self.log(f"{kind}: written to {folder}")
        return Artefact(folder, reused=False)

    def _intact(self, folder: Path) -> bool:
        if not (folder / NOTE).is_file():
            return False
        try:
            note = parse_json((folder / NOTE).read_text(encoding="utf-8"))
            check_note(folder / NOTE, note)
            is_own = note["name"] == folder.name
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_own = False
        if not is_own:
            self.log(f"{folder} is damaged: it is built anew")
        return is_own

    def _outdated(self, kind: str, facts: Mapping[str, Any]) -> str | None:
        """Why an artefact of the same data and settings cannot be taken; None where there is none."""
        wanted = json_form(facts)
        for note in sorted(self.folder.glob(f"{kind}-*/artefact.json")):
            try:
                found = parse_json(note.read_text(encoding="utf-8"))
                depends = dict(found["depends"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged, or no artefact
            changed = {name for name in depends.keys() | wanted.keys() if depends.get(name) != wanted.get(name)}
            if changed and changed <= SOFTWARE.keys():
                what = " and ".join(SOFTWARE[name] for name in sorted(changed))
                made = maker(found.get("made_by"))
                return f"{note.parent} was made by {made}, with another {what}; it stays, and one is built anew"
        return None

    def _publish(self, folder: Path, facts: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        partial = self.folder / f".{folder.name}.{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            write(partial)
            write_note(partial / NOTE, {"name": folder.name, "depends": facts, "made_by": made_by()})
            sync_folder(partial)
            self._place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, partial: Path, folder: Path) -> None:
        """Rename into place; a whole artefact that another run has published first stays, since it may be in use."""
        while True:
            try:
                os.rename(partial, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self._intact(folder):
                return
            aside = folder.with_name(f".{folder.name}.damaged.{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):  # another run has moved it already
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)


def write_note(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON file of ``facts``, the SHA-256 of every file that lies beside it, and its own (:data:`SEAL`)."""
    files = {str(p.relative_to(path.parent)): file_digest(p) for p in sorted(path.parent.rglob("*")) if p.is_file()}
    content = json_form({**facts, "files": files})
    write_json(path, {**content, SEAL: digest_of(content)})


def check_note(path: Path, note: Mapping[str, Any]) -> None:
    """Check that a note of :func:`write_note`, as it was read, and the files beside it are unchanged.

    Raises:
        CheckpointError: one of them has, or is missing; names it.
    """
    if digest_of({name: value for name, value in note.items() if name != SEAL}) != note.get(SEAL):
        raise CheckpointError(f"{path}: does not match its SHA-256")
    for file, digest in note["files"].items():
        if file_digest(path.parent / file) != digest:
            raise CheckpointError(f"{path.parent / file}: does not match its SHA-256")


def json_form(value: Any) -> Any:
    """A JSON-able value as it is read back: tuples are lists, and keys texts."""
    return json.loads(json.dumps(value))


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
