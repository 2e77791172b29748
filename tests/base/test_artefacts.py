"""Artefacts: reused while whole and current, rebuilt when damaged, never half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.base import artefacts
from fedsim.base.artefacts import Artefact, ArtefactStore, digest_of, file_digest
from fedsim.base.ranks import OneRank
from fedsim.base.version import made_by, maker


class Counting:
    """A store whose builds are counted."""

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        self.num_builds = 0
        self.store = ArtefactStore(folder / "deep" / "artefacts", OneRank(), self.log.append)

    def get(self, depends: dict[str, Any], version: int = 1, kind: str = "thing") -> Artefact:
        return self.store.get(kind, depends, version, self._build, _write)

    def _build(self) -> int:
        self.num_builds += 1
        return self.num_builds


def _write(folder: Path, result: int) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text(f"built {result}")
    (folder / "b.bin").write_bytes(bytes(range(256)))


@pytest.fixture()
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


def test_built_once_then_reused(counting: Counting, tmp_path: Path) -> None:
    first, second = counting.get({"a": 1, "b": [2]}), counting.get({"b": [2], "a": 1})
    assert (first.reused, second.reused, counting.num_builds) == (False, True, 1)
    assert first.folder == second.folder and first.folder.name.startswith("thing-")
    assert (first.folder / "sub" / "a.txt").read_text() == "built 1"
    assert "written to" in counting.log[0] and "reused" in counting.log[1]
    other = Counting(tmp_path)
    assert other.get({"a": 1, "b": [2]}).reused, "another run finds it"


@pytest.mark.parametrize("depends", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {}, {"a": 1.5}])
def test_other_dependencies_are_another_artefact(counting: Counting, depends: dict[str, Any]) -> None:
    first = counting.get({"a": 1})
    assert counting.get(depends).folder != first.folder
    assert counting.get({"a": 1}, kind="other").folder != first.folder
    assert counting.num_builds == 3


@pytest.mark.parametrize("damage", ["change", "delete", "note", "note cut", "note of another kind"])
def test_a_damaged_artefact_is_built_anew(counting: Counting, damage: str) -> None:
    folder = counting.get({"a": 1}).folder
    if damage == "change":
        (folder / "b.bin").write_bytes(bytes(255) + b"\x01")
    elif damage == "delete":
        (folder / "sub" / "a.txt").unlink()
    elif damage == "note":
        (folder / "artefact.json").unlink()
    else:
        (folder / "artefact.json").write_text('{"files": {"b' if damage == "note cut" else "[1]")
    again = counting.get({"a": 1})
    assert not again.reused and again.folder == folder and counting.num_builds == 2
    assert (folder / "sub" / "a.txt").read_text() == "built 2"
    assert counting.get({"a": 1}).reused
    if damage != "note":
        assert any("damaged" in line for line in counting.log)
    assert not any("was made by" in line for line in counting.log), "damage is no other version"


def test_a_failing_build_or_write_leaves_nothing(counting: Counting) -> None:
    def broken_write(folder: Path, result: int) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    def broken_build() -> int:
        raise RuntimeError("no")

    with pytest.raises(OSError, match="disk full"):
        counting.store.get("thing", {"a": 1}, 1, lambda: 1, broken_write)
    with pytest.raises(RuntimeError, match="no"):
        counting.store.get("thing", {"a": 1}, 1, broken_build, _write)
    assert list(counting.store.folder.iterdir()) == []
    assert not counting.get({"a": 1}).reused


def test_the_note_says_what_it_depends_on(counting: Counting) -> None:
    folder = counting.get({"a": "é"}).folder
    note = json.loads((folder / "artefact.json").read_text(encoding="utf-8"))
    assert note["depends"] == {"a": "é", "version": 1}
    assert note["files"] == {
        "b.bin": file_digest(folder / "b.bin"),
        "sub/a.txt": file_digest(folder / "sub" / "a.txt"),
    }


def test_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1}) != digest_of({"a": 1, "b": 2})


def test_a_whole_artefact_that_another_run_published_first_stays(tmp_path: Path) -> None:
    mine, other = (ArtefactStore(tmp_path, OneRank(), lambda text: None) for _ in range(2))

    def build() -> str:  # while this run builds, another one publishes the same key
        other.get("thing", {"a": 1}, 1, lambda: "theirs", lambda folder, text: _put(folder, text))
        return "ours"

    found = mine.get("thing", {"a": 1}, 1, build, lambda folder, text: _put(folder, text))
    assert (found.folder / "text").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == [found.folder.name], "nothing partial is left"


def test_a_damaged_artefact_gives_way(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path, OneRank(), lambda text: None)

    def get(text: str) -> Artefact:
        return store.get("thing", {"a": 1}, 1, lambda: text, lambda folder, text: _put(folder, text))

    (get("first").folder / "text").write_text("damaged")
    assert (get("second").folder / "text").read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 1


def _put(folder: Path, text: str) -> None:
    (folder / "text").write_text(text)


def test_an_artefact_of_another_version_is_named_and_stays(counting: Counting) -> None:
    """Same data and settings, another version: built again, and the log says who made the old one."""
    depends = {"a": (1, 2), "versions": {"torch": "1"}}
    old = counting.get(depends, version=1).folder
    new = counting.get(depends, version=2).folder
    told = [line for line in counting.log if "a new one is built" in line]
    assert told == [
        f"thing: {old} was made by {maker(made_by())}, with another version of what makes it; it "
        "stays, and a new one is built"
    ]
    assert new != old and old.is_dir()
    counting.get({**depends, "versions": {"torch": "2"}}, version=2)
    assert "version of a package; it stays" in counting.log[-2]  # beside one of them, or of both
    num_told = len(counting.log)
    for other, kind in (({"a": (1, 3), "versions": {"torch": "1"}}, "thing"), (depends, "thin"), ({}, "thing")):
        counting.get(other, 2, kind)  # other data, another kind, other settings: no version of the same
    assert not any("a new one is built" in line for line in counting.log[num_told:])
    (old / "artefact.json").write_text("{")
    assert counting.get(depends, version=2).reused, "a damaged neighbour is in nobody's way"


def test_the_commit_is_in_the_note_and_not_in_the_key(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another commit that computes the same reuses it."""
    folder = counting.get({"a": 1}).folder
    assert json.loads((folder / "artefact.json").read_text())["made_by"] == made_by()
    other = {"fedsim": "9.9.9", "git": {"commit": "0" * 40, "modified": True}}
    monkeypatch.setattr(artefacts, "made_by", lambda: other)
    again = counting.get({"a": 1})
    assert again.reused and again.folder == folder
    assert json.loads((counting.get({"a": 2}).folder / "artefact.json").read_text())["made_by"] == other
