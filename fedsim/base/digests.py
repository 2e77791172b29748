"""Cache of the SHA-256 of model weights, so that each file is read once: 80 GB take minutes.

The digest of a file of :data:`LARGE` bytes or more is kept in the process, and in
``file-digests.json`` of the artefacts folder, by the file's resolved path, size, inode, and times
of its last change of content (mtime) and of content or attributes (ctime), in nanoseconds. A file
that differs in any of them is read again. What the cache trusts: a file whose values are all as
before holds the same bytes. No ordinary write keeps them, since no program can set ctime; a file
system whose clock went back, or a disk image edited from outside, could.
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
"""Least age of a file's last change, in nanoseconds, for its digest to be kept.

A younger file may change again within one tick of the file system's clock.
"""

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
        # Files by name, each with the bytes of its own digest.
        digest = hashlib.sha256()
        files: set[Path] = set()
        for pattern in ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"):
            files.update(folder.glob(pattern))
        for file in sorted(files):
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(self.of(file)))
        return digest.hexdigest()

    def of(self, file: Path) -> str:
        """SHA-256 of a file; a large one is read only if its digest is not kept."""
        if file.stat().st_size < LARGE:
            return file_digest(file)
        # First this process's digests, then those of the folder, then the file itself.
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
        """The digests that are kept; none if the file is missing or damaged."""
        try:
            found = parse_json(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        kept = {}
        for identity, value in found.items():
            if isinstance(value, str) and _is_sha256(value):
                kept[identity] = value
        return kept

    def _keep(self, identity: str, digest: str) -> None:
        """Add a digest by one atomic rename, and forget files that are gone or have changed since.

        If the folder cannot be written, the next process reads the file again. Of two processes
        that write at once one loses an entry, which costs one reading.
        """
        kept = {name: value for name, value in self._read().items() if _is_current(name)}
        kept[identity] = digest

        # Write beside the file, then rename.
        partial = self.file.with_name(f".{NAME}.{uuid.uuid4().hex}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, self.file)
        except OSError:
            with suppress(OSError):
                partial.unlink()


def _identity(file: Path) -> str:
    """Key of a file in the cache, as JSON: path, device, inode, size, mtime and ctime (ns)."""
    resolved = file.resolve()
    found = resolved.stat()
    return json.dumps(
        [
            str(resolved),
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        ]
    )


def _is_current(identity: str) -> bool:
    """Return whether the file of an entry is still there, unchanged."""
    try:
        return _identity(Path(json.loads(identity)[0])) == identity
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_settled(file: Path) -> bool:
    """Return whether a file's last change is older than :data:`SETTLED_NS`."""
    changed = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns)
    return time.time_ns() - changed > SETTLED_NS


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
