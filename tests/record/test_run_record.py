"""The run directory: one process at a time, one configuration, and a resume that trusts only what is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.checkpoint import Checkpoint
from fedsim.config import Config, load_config
from fedsim.errors import CheckpointError, ConfigError
from fedsim.federation.algorithms import ServerState
from fedsim.federation.client_state import ClientStateStore
from fedsim.ranks import OneRank
from fedsim.record.run_record import RunRecord


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [f"record.dir={tmp_path}", "name=run", *overrides])


def opened(tmp_path: Path, *overrides: str) -> RunRecord:
    made = RunRecord(config(tmp_path, *overrides), OneRank(), synchronize=False)
    made.claim()
    return made


def finish_round(record: RunRecord, round_idx: int, client_rounds: dict[int, int]) -> None:
    state = ServerState(torch.full((3,), float(round_idx)), {"control": torch.zeros(3)})
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
