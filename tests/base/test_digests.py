"""Digests of large files: read once per process and folder, and again after any change."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.base import digests
from fedsim.base.digests import NAME, FileDigests

OLD_S = 1_000_000_000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are read, in order; every file counts as large, and no digest is known."""
    found: list[Path] = []
    read = digests.file_digest

    def counted(path: Path) -> str:
        found.append(path)
        return read(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED_NS", -(10**18))
    forget(monkeypatch)
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(digests, "_known", {})


def made(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(content)
    os.utime(path, (OLD_S, OLD_S))
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_in_a_process_and_once_over_processes(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = made(tmp_path / "a.safetensors"), tmp_path / "artefacts"
    for _ in range(3):
        assert FileDigests(folder).of(file) == sha256(b"weights")
    assert reads == [file]
    forget(monkeypatch)
    assert FileDigests(folder).of(file) == sha256(b"weights") and reads == [file], "kept in the folder"
    forget(monkeypatch)
    assert FileDigests(tmp_path / "other").of(file) == sha256(b"weights") and reads == [file, file]


def rewritten(file: Path) -> None:
    """Other bytes of the same length, with the old mtime put back: only ctime tells."""
    time.sleep(0.02)
    made(file, b"WEIGHTS")


def replaced(file: Path) -> None:
    made(file.with_name("new"), b"WEIGHTS").replace(file)


def grown(file: Path) -> None:
    made(file, b"weights and more")


def touched(file: Path) -> None:
    file.write_bytes(b"WEIGHTS")


@pytest.mark.parametrize("change", [rewritten, replaced, grown, touched])
@pytest.mark.parametrize("new_process", [False, True])
def test_a_changed_file_is_read_again(
    tmp_path: Path,
    reads: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    new_process: bool,
) -> None:
    file, cache = made(tmp_path / "a.safetensors"), FileDigests(tmp_path / "artefacts")
    cache.of(file)
    change(file)
    if new_process:
        forget(monkeypatch)
    assert cache.of(file) == sha256(file.read_bytes()) and len(reads) == 2
    assert cache.of(file) == sha256(file.read_bytes()) and len(reads) == 2
    kept = json.loads((tmp_path / "artefacts" / NAME).read_text())
    assert list(kept.values()) == [sha256(file.read_bytes())], "the entry of the file as it was is gone"


def test_files_of_one_size_and_time_have_their_own_digests(tmp_path: Path, reads: list[Path]) -> None:
    one, two = made(tmp_path / "1.safetensors", b"weights"), made(tmp_path / "2.safetensors", b"WEIGHTS")
    assert one.stat().st_mtime_ns == two.stat().st_mtime_ns and one.stat().st_size == two.stat().st_size
    cache = FileDigests(tmp_path / "artefacts")
    assert [cache.of(one), cache.of(two)] == [sha256(b"weights"), sha256(b"WEIGHTS")] and reads == [one, two]


def test_a_link_is_the_file_that_it_names(tmp_path: Path, reads: list[Path]) -> None:
    """As in Hugging Face's cache, whose snapshots link to blobs."""
    blob, link = made(tmp_path / "blob"), tmp_path / "model.safetensors"
    link.symlink_to(blob)
    cache = FileDigests(tmp_path / "artefacts")
    assert cache.of(link) == cache.of(blob) and len(reads) == 1
    other = made(tmp_path / "other", b"WEIGHTS")
    link.unlink()
    link.symlink_to(other)
    assert cache.of(link) == sha256(b"WEIGHTS")


def test_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    file, cache = made(tmp_path / "a.safetensors"), FileDigests(tmp_path / "artefacts")
    assert [cache.of(file), cache.of(file)] == [sha256(b"weights")] * 2 and len(reads) == 2
    assert not (tmp_path / "artefacts").exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = made(tmp_path / "a.safetensors"), FileDigests(tmp_path / "artefacts")
    read = digests.file_digest

    def changing(path: Path) -> str:
        found = read(path)
        made(path, b"other weights")
        return found

    monkeypatch.setattr(digests, "file_digest", changing)
    cache.of(file)
    monkeypatch.setattr(digests, "file_digest", read)
    assert cache.of(file) == sha256(b"other weights")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', '{"x": "y"}', '{"[1]": "' + 64 * "0" + '"}', "\udcff"])
def test_a_damaged_record_costs_a_reading_and_no_more(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    file, cache = made(tmp_path / "a.safetensors"), FileDigests(tmp_path)
    (tmp_path / NAME).write_bytes(content.encode(errors="surrogateescape"))
    assert cache.of(file) == sha256(b"weights") and reads == [file]
    forget(monkeypatch)
    assert cache.of(file) == sha256(b"weights") and reads == [file], "the record was made anew"


def test_where_nothing_can_be_kept_the_digest_is_right(tmp_path: Path, reads: list[Path]) -> None:
    file, blocked = made(tmp_path / "a.safetensors"), made(tmp_path / "no-folder")
    assert FileDigests(blocked).of(file) == sha256(b"weights")


def test_entries_of_files_that_are_gone_are_dropped(tmp_path: Path, reads: list[Path]) -> None:
    cache = FileDigests(tmp_path / "artefacts")
    one, two = made(tmp_path / "1"), made(tmp_path / "2")
    cache.of(one)
    one.unlink()
    cache.of(two)
    kept = json.loads((tmp_path / "artefacts" / NAME).read_text())
    assert [json.loads(name)[0] for name in kept] == [str(two)]


def test_small_files_are_always_read(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "LARGE", 1000)
    file, cache = made(tmp_path / "config.json", b"{}"), FileDigests(tmp_path / "artefacts")
    assert [cache.of(file), cache.of(file)] == [sha256(b"{}")] * 2 and len(reads) == 2
    assert not (tmp_path / "artefacts").exists()


def test_a_models_digest_is_of_names_and_contents(tmp_path: Path, reads: list[Path]) -> None:
    for name in ("model.safetensors", "config.json", "README.md"):
        made(tmp_path / name, name.encode())
    expected = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        expected.update(name.encode() + hashlib.sha256(name.encode()).digest())
    assert FileDigests(tmp_path / "artefacts").model(tmp_path) == expected.hexdigest()
