"""The run that a directory holds against the one that is asked for: files and models count by their content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fedsim.base.digests import FileDigests, file_digest
from fedsim.base.errors import CheckpointError
from fedsim.config import Config, file_roles, load_config, model_roles, to_flat, to_nested
from fedsim.record.sameness import compare

MODEL_FILES = {"config.json": '{"kites": 1}', "model.safetensors": "weights"}


def made_config(folder: Path, key: str, value: object) -> Config:
    """A configuration in which ``key`` may be set: DeepSpeed and the judges want others too."""
    beside = {
        "guard.deepspeed": ["parallel.exact=false", "guard.kind=llama_guard"],
        "judge.prompts": ["judge.kind=openai"],
        "judge.path": ["judge.kind=local"],
    }
    return load_config(None, [f"record.dir={folder}", *beside.get(key, []), f"{key}={value}"])


def write_run(folder: Path, config: Config, inputs: dict[str, str], models: dict[str, str]) -> None:
    """Leave the configuration and manifest of a run."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_nested(config)))
    entries = {role: {"path": "", "num_bytes": 0, "sha256": digest} for role, digest in inputs.items()}
    (folder / "manifest.json").write_text(json.dumps({"inputs": entries, "models": models}))


def test_every_key_that_names_a_file_or_model_is_declared_so() -> None:
    """By its default or name: a new key of this kind must say its role."""
    roles = {**file_roles(), **model_roles()}
    named = {key for key, value in to_flat(Config()).items() if value == "embedded" or key.endswith(".path")}
    others = {"eval.mt_bench_references", "judge.prompts", "cai.constitution", "guard.deepspeed"}
    assert set(roles) == named | others and len(set(roles.values())) == len(roles)


@pytest.mark.parametrize("key", file_roles())
def test_a_file_that_was_moved_is_the_same_and_one_of_other_bytes_is_not(tmp_path: Path, key: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kites")
    write_run(tmp_path / "run", made_config(tmp_path, key, old), {file_roles()[key]: file_digest(old)}, {})
    old.rename(new)
    config = made_config(tmp_path, key, new)
    found = compare(tmp_path / "run", config)
    assert not found.changed and found.moved == [f"{key} was {str(old)!r}, is {str(new)!r}"]
    for content in ("kite", None):  # other bytes, or gone
        new.write_text(content) if content else new.unlink()
        found = compare(tmp_path / "run", config)
        assert not found.moved and found.changed == [f"{key} was {str(old)!r}, is {str(new)!r}, of other content"]


@pytest.mark.parametrize("key", model_roles())
def test_a_model_that_was_moved_is_the_same_and_one_of_other_bytes_is_not(tmp_path: Path, key: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name, text in MODEL_FILES.items():
        (old / name).write_text(text)
    digest = FileDigests(tmp_path).model(old)
    write_run(tmp_path / "run", made_config(tmp_path, key, old), {}, {model_roles()[key]: digest})
    old.rename(new)
    config = made_config(tmp_path, key, new)
    assert not compare(tmp_path / "run", config).changed
    for name in MODEL_FILES:
        shutil.copytree(new, tmp_path / "copy")
        (new / name).write_text("other")
        assert "of other content" in compare(tmp_path / "run", config).changed[0]
        shutil.rmtree(new)
        (tmp_path / "copy").rename(new)


def test_the_embedded_world_and_nothing_are_no_paths(tmp_path: Path) -> None:
    """Its items have scores of their own, so that its file under another name is not the same run."""
    path = tmp_path / "advbench.csv"
    path.write_text("goal,target\n")
    digest = {"advbench": file_digest(path)}
    for i, words in enumerate((path, "embedded", "embedded-held-out", "")):
        write_run(tmp_path / str(i), made_config(tmp_path, "eval.advbench", words), digest, {})
        for other in {path, "embedded", "embedded-held-out", ""} - {words}:
            found = compare(tmp_path / str(i), made_config(tmp_path, "eval.advbench", other))
            assert len(found.changed) == 1 and not found.moved


def test_what_a_run_does_not_read_may_lie_anywhere(tmp_path: Path) -> None:
    write_run(tmp_path / "run", made_config(tmp_path, "guard.path", "/one"), {}, {})
    assert not compare(tmp_path / "run", made_config(tmp_path, "guard.path", "/two")).changed


def test_other_keys_are_compared_by_value_and_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", made_config(tmp_path, "data.square", "/one"), {}, {})
    changed = load_config(None, [f"record.dir={tmp_path}/x", "data.square=/one", "local.lr=0.5", "wandb.mode=off"])
    assert compare(tmp_path / "run", changed).changed == ["local.lr was 5e-05, is 0.5"]
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        compare(tmp_path / "run", made_config(tmp_path, "data.square", "/two"))


def test_without_a_manifest_nothing_is_said_of_the_content(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_run(tmp_path / "run", made_config(tmp_path, "data.square", old), {}, {})
    (tmp_path / "run" / "manifest.json").unlink()
    (words,) = compare(tmp_path / "run", made_config(tmp_path, "data.square", new)).changed
    assert words.endswith("and no manifest.json has its content's SHA-256")
