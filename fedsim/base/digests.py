"""SHA-256 of model weights, each file read once: 80 GB take minutes, and a run asks for them several times.

The digest of a file of :data:`LARGE` bytes or more is kept in the process, and in ``file-digests.json`` of the
artefacts folder, by the file's resolved path, size, inode, and times of its last change of content (mtime) and of
content or attributes (ctime), in nanoseconds. A file that differs in any of them is read again. What the cache trusts:
a file whose values are all as before holds the same bytes. No ordinary write keeps them, since no program can set
ctime; a file system whose clock went back, or a disk image edited from outside, could.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedsim.base.json_text import parse_json

NAME: Final = "file-digests.json"

LARGE: Final = 64 * 2**20
"""Bytes from which on a file's digest is kept; smaller ones are read in less than 0.1 s."""

SETTLED_NS: Final = 2_000_000_000
"""A file changed less than so long ago may change again within one tick of the file system's clock: not kept."""

_known: dict[str, str] = {}
"""Digests that this process has computed or read, by :func:`_identity`."""


class FileDigests:
    """Digests of large files, kept in a folder that runs share.

    Args:
        folder: of artefacts; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME

    def model(self, folder: Path) -> str:
        """SHA-256 over names and contents of the files that decide a model's output."""
        digest = hashlib.sha256()
        names = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
        for file in sorted({found for pattern in names for found in folder.glob(pattern)}):
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(self.of(file)))
        return digest.hexdigest()

    def of(self, file: Path) -> str:
        """SHA-256 of a file; a large one is read only if it is not as it was when its digest was kept."""
        if file.stat().st_size < LARGE:
            return file_digest(file)
        identity = _identity(file)
        if identity not in _known:
            _known.update(self._read())
        if identity not in _known:
            digest = file_digest(file)
            if not _is_settled(file):
                return digest
            _known[identity] = digest
            self._keep(identity, digest)
        return _known[identity]

    def _read(self) -> dict[str, str]:
        """What is kept; nothing where the file is missing or damaged."""
        try:
            found = parse_json(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {name: value for name, value in found.items() if isinstance(value, str) and _is_sha256(value)}

    def _keep(self, identity: str, digest: str) -> None:
        """Add a digest by one rename, and forget files that are gone or have changed since.

        Where the folder cannot be written the file is read again by the next process. Of two processes that write at
        once one loses an entry, which costs a reading.
        """
        kept = {name: value for name, value in self._read().items() if _is_current(name)} | {identity: digest}
        partial = self.file.with_name(f".{NAME}.{uuid.uuid4().hex}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, self.file)
        except OSError:
            with suppress(OSError):
                partial.unlink()


def _identity(file: Path) -> str:
    """What a file is known by, as JSON: path, device, inode, size, mtime and ctime."""
    resolved = file.resolve()
    found = resolved.stat()
    return json.dumps([str(resolved), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])


def _is_current(identity: str) -> bool:
    """Tell whether the file of an entry is still there, as it was."""
    try:
        return _identity(Path(json.loads(identity)[0])) == identity
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_settled(file: Path) -> bool:
    return time.time_ns() - max(file.stat().st_mtime_ns, file.stat().st_ctime_ns) > SETTLED_NS


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
