"""manifest.json names versions, hashes, hardware and commit, and survives a resume."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from fedsim.base.errors import CheckpointError, DataError
from fedsim.base.version import made_by
from fedsim.record.manifest import add_note, hardware, versions, write_manifest


def test_what_a_manifest_holds(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_bytes(b"[]\n")
    path = write_manifest(
        tmp_path,
        {"seed": 7, "name": "x"},
        {"square": data},
        {"base": "ab" * 32},
        {"base": "eager"},
        num_ranks=4,
        devices={"backend": "gloo"},
        pass_tokens={"local training": 8192},
    )
    manifest = json.loads(path.read_text())
    assert path == tmp_path / "manifest.json"
    assert manifest["seed"] == 7 and manifest["config"] == {"seed": 7, "name": "x"}
    expected = {"path": str(data), "num_bytes": 3, "sha256": hashlib.sha256(b"[]\n").hexdigest()}
    assert manifest["inputs"] == {"square": expected}
    assert manifest["models"] == {"base": "ab" * 32} and manifest["attention"] == {"base": "eager"}
    assert manifest["started"]["num_ranks"] == 4 and manifest["started"]["utc"].endswith("+00:00")
    assert manifest["threads"]["torch"] >= 1 and manifest["git"] == made_by()["git"]
    assert manifest["devices"] == {"backend": "gloo"} and manifest["pass_tokens"] == {"local training": 8192}
    assert "resumed" not in manifest


def test_a_resume_adds_to_the_manifest_it_finds(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"seed": 1}, {}, {}, {}, num_ranks=4)
    first = json.loads((tmp_path / "manifest.json").read_text())
    write_manifest(tmp_path, {"seed": 1}, {}, {}, {}, num_ranks=2)
    write_manifest(tmp_path, {"seed": 1}, {}, {}, {"model": "sdpa"}, num_ranks=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["attention"] for entry in manifest["resumed"]] == [{}, {"model": "sdpa"}]
    assert [entry["git"] for entry in manifest["resumed"]] == [first["git"]] * 2, "a session may have another commit"
    assert [entry["num_ranks"] for entry in manifest.pop("resumed")] == [2, 3]
    assert manifest == first
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_notes_belong_to_the_session_that_makes_them(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, {}, {}, {}, {}, num_ranks=1)
    for note in ("a", "b"):
        add_note(path, note)
    write_manifest(tmp_path, {}, {}, {}, {}, num_ranks=1)
    add_note(path, "c")
    manifest = json.loads(path.read_text())
    assert manifest["notes"] == ["a", "b"] and manifest["resumed"][0]["notes"] == ["c"]


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"advbench file .*absent\.csv"):
        write_manifest(tmp_path, {}, {"advbench": tmp_path / "absent.csv"}, {}, {}, num_ranks=1)
    assert not (tmp_path / "manifest.json").exists()


def test_versions_are_the_installed_ones() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for package in ("torch", "transformers", "peft", "numpy", "tokenizers", "datasets"):
        assert found[package] == importlib.metadata.version(package)


def test_hardware_is_this_machine() -> None:
    found = hardware()
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**28 and isinstance(found["gpus"], list)


def test_a_run_does_not_go_on_with_changed_inputs_or_models(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    write_manifest(tmp_path, {}, {"square": data}, {"model": "a"}, {}, num_ranks=1)
    write_manifest(tmp_path, {}, {"square": data}, {"model": "a"}, {}, num_ranks=1)
    with pytest.raises(CheckpointError, match="the model of this run changed"):
        write_manifest(tmp_path, {}, {"square": data}, {"model": "b"}, {}, num_ranks=1)
    data.write_text("[1]")
    with pytest.raises(CheckpointError, match="the square of this run changed"):
        write_manifest(tmp_path, {}, {"square": data}, {"model": "a"}, {}, num_ranks=1)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"inputs": {}}', '{"inputs": {"square": {}}, "models": {}}', '{"inputs": [], "models": {}}',
     '{"inputs": {}, "models": {"model": 3}}', '{"inputs": {}, "models": {}, "resumed": 3}', "\udcff"],
)  # fmt: skip
def test_a_damaged_manifest_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"{path}: is damaged.*restore it, or start again") as caught:
        write_manifest(tmp_path, {}, {}, {}, {}, num_ranks=1)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape"), "it is left as it was"
