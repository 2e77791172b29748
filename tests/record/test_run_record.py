"""The run directory: one process at a time, one configuration, and a resume that trusts only what is whole."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from fedsim.base.errors import CheckpointError, ConfigError
from fedsim.base.exit_file import read_ending
from fedsim.base.ranks import OneRank
from fedsim.base.version import sign
from fedsim.config import Config, load_config
from fedsim.federation.algorithms import ServerState
from fedsim.federation.client_state import ClientStateStore
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.lock import DirectoryLock
from fedsim.record.metrics import MetricLog
from fedsim.record.run_record import RunRecord


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [f"record.dir={tmp_path}", "name=run", *overrides])


def opened(tmp_path: Path, *overrides: str) -> RunRecord:
    made = RunRecord(config(tmp_path, *overrides), OneRank(), synchronize=False)
    made.claim()
    return made


def finish_round(record: RunRecord, round_idx: int, client_rounds: dict[int, int]) -> None:
    state = ServerState(torch.full((3,), float(round_idx)), {"control": torch.zeros(3)})
    record.append(round_idx, "round", {"client/loss": 1.0})
    (record.folder / "manifest.json").write_text("{}")
    record.checkpoints.save(Checkpoint(round_idx, state, client_rounds))


def test_a_second_process_may_not_use_the_directory(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(ConfigError, match="another process is running this very run"):
        opened(tmp_path)
    first.release()
    opened(tmp_path).release()


def test_a_directory_without_a_finished_round_takes_another_configuration(tmp_path: Path) -> None:
    opened(tmp_path, "eval.advbench=/misspelt.csv").release()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    opened(tmp_path, "eval.advbench=embedded").release()
    assert load_config(tmp_path / "run" / "config.yaml").eval.advbench == "embedded"
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_run_with_finished_rounds_keeps_its_configuration(tmp_path: Path) -> None:
    record = opened(tmp_path)
    finish_round(record, 0, {})
    record.release()
    with pytest.raises(ConfigError, match=r"another configuration \(seed was 0, is 1\)"):
        opened(tmp_path, "seed=1")
    opened(tmp_path, "record.keep_checkpoints=5").release()


def test_a_damaged_control_variate_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    record = opened(tmp_path)
    controls = ClientStateStore(record.client_state)
    for round_idx in (0, 1):
        controls.save(7, round_idx, torch.full((3,), float(round_idx)))
        finish_round(record, round_idx, {7: round_idx})
    newest = sorted(record.client_state.iterdir())[-1]
    whole = newest.read_bytes()
    found = record.resume(lambda state: None)
    assert found is not None and found.round_idx == 1
    newest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = record.resume(lambda state: None)
    assert found is not None and found.round_idx == 0
    sorted(record.client_state.iterdir())[0].unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        record.resume(lambda state: None)
    record.release()


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record.dir=.*cannot be made or written"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(3, dtype=torch.float64)], ids=["shape", "type"])
def test_a_control_variate_that_does_not_fit_falls_back_and_says_so(
    tmp_path: Path, wrong: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    record = opened(tmp_path)
    controls = ClientStateStore(record.client_state)
    for round_idx, vector in enumerate([torch.ones(3), wrong]):
        controls.save(7, round_idx, vector)
        finish_round(record, round_idx, {7: round_idx})
    found = record.resume(lambda state: None)
    record.release()
    assert found is not None and found.round_idx == 0
    said = capsys.readouterr().err
    assert "control variate of client 7" in said and "the one before it is used" in said


def finish(tmp_path: Path) -> RunRecord:
    """A run of two rounds that has come to its end, and whose checkpoints were removed."""
    record = opened(tmp_path, "federation.num_rounds=2")
    for round_idx in (0, 1):
        finish_round(record, round_idx, {})
    (record.folder / "adapter").mkdir()
    (record.folder / "adapter" / "adapter_model.safetensors").write_text("kites")
    sign(record.folder / "adapter")
    (record.folder / "summary.md").write_text("# Run")
    record.finished()
    record.release()
    shutil.rmtree(record.checkpoints.folder)
    return record


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but the logs and locks, with its time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files if path.name[0] != "."}


@pytest.mark.parametrize("has_ending", [True, False])
def test_a_finished_run_without_checkpoints_stays_as_it_is(tmp_path: Path, has_ending: bool) -> None:
    folder = finish(tmp_path).folder
    (folder / "exit.json").unlink() if not has_ending else None
    before = contents(folder)
    again = RunRecord(config(tmp_path, "federation.num_rounds=2"), OneRank(), synchronize=False)
    again.check_directory()
    assert again.is_finished
    again.claim()
    assert again.is_finished and contents(folder) == before
    again.finished()
    again.release()
    note = read_ending(folder)
    assert note is not None and note["reason"] == "finished"
    with pytest.raises(ConfigError, match=r"another configuration \(federation\.num_rounds was 2, is 3\)"):
        opened(tmp_path, "federation.num_rounds=3")


@pytest.mark.parametrize("lost", ["adapter/fedsim.json", "adapter/adapter_model.safetensors", "summary.md", "row"])
def test_rounds_without_a_checkpoint_begin_again_and_say_so(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = finish(tmp_path)
    if lost == "row":
        MetricLog(record.metrics_file).truncate_after(0)
    else:
        (record.folder / lost).unlink()
    capsys.readouterr()
    with pytest.raises(ConfigError, match="another configuration"):
        opened(tmp_path, "federation.num_rounds=2", "seed=1")
    again = opened(tmp_path, "federation.num_rounds=2")
    said = capsys.readouterr().err
    number = 1 if lost == "row" else 2
    assert not again.is_finished and f"no checkpoint is left of the {number} round(s) in {again.folder}" in said
    assert "begins again with round 1" in said and again.resume(lambda state: None) is None
    assert not MetricLog(again.metrics_file).rows() and not (again.folder / "exit.json").exists()
    again.release()


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("overrides", [(), ("local.lr=1e-3",)])
def test_checkpoints_without_what_tells_their_run_are_not_adopted(
    tmp_path: Path, name: str, overrides: tuple[str, ...]
) -> None:
    record = opened(tmp_path)
    finish_round(record, 0, {})
    record.release()
    (record.folder / name).unlink()
    before = sorted(p.name for p in record.folder.rglob("*"))
    for attempt in (
        record.claim,
        RunRecord(config(tmp_path, *overrides), OneRank(), synchronize=False).check_directory,
    ):
        with pytest.raises(CheckpointError, match=rf"{record.folder}: holds checkpoints, but no {name}.*put it back"):
            attempt()
    record.release()
    assert sorted(p.name for p in record.folder.rglob("*")) == before


@pytest.mark.parametrize("present", ["checkpoints", "metrics.jsonl", "config.yaml"])
def test_never_forbids_a_folder_that_holds_anything(tmp_path: Path, present: str) -> None:
    (tmp_path / "run").mkdir()
    opened(tmp_path, "record.resume=never").release()
    made = opened(tmp_path / "other")
    finish_round(made, 0, {})
    made.release()
    for path in list(made.folder.iterdir()):
        if path.name != present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = RunRecord(config(tmp_path / "other", "record.resume=never"), OneRank(), synchronize=False)
    for attempt in (again.claim, again.check_directory):
        with pytest.raises(ConfigError, match=r"record\.resume=never: .*run exists"):
            attempt()
    again.release()


@pytest.mark.parametrize("method", ["claim", "check_directory"])
def test_a_name_that_no_file_system_takes_is_one_error(tmp_path: Path, method: str) -> None:
    record = RunRecord(config(tmp_path, f"name={'n' * 300}"), OneRank(), synchronize=False)
    with pytest.raises(ConfigError, match=r"name='n+'.*cannot be made or written \(File name too long\)"):
        getattr(record, method)()


def test_a_session_waits_for_the_ranks_of_the_one_before(tmp_path: Path) -> None:
    """A rank that outlives a killed rank 0 may still be writing; it leaves soon, or is named."""
    (tmp_path / "run").mkdir()
    old, new = DirectoryLock(tmp_path / "run"), DirectoryLock(tmp_path / "run")
    old.join()
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"run: processes of an earlier session .* have not ended in 0\.3 s"):
        new.hold(said.append, patience_s=0.3)
    assert len(said) == 1 and "waiting" in said[0]
    threading.Timer(0.4, old.release).start()
    new.hold(said.append, patience_s=10)
    new.join()
    with pytest.raises(ConfigError, match="another process is running this very run"):
        old.hold(said.append, dying_s=0.2)
    threading.Timer(0.3, new.release).start()  # as the kernel does, once a killed rank 0's memory is freed
    old.hold(said.append, patience_s=0)
    old.release()
    assert len(said) == 2
