"""A full disk: one error that names the disk, nothing finished is lost, and the run goes on once there is space."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedsim.base.artefacts import file_digest
from fedsim.base.disk import explaining_full_disk, is_disk_full
from fedsim.base.errors import DataError, DiskFullError, FedsimError
from fedsim.base.journal import Journal
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.parallel.exits import to_picklable
from fedsim.parallel.world import World
from fedsim.record.folders import DiskRoom
from fedsim.record.metrics import decided_rows, read_rows
from fedsim.run import checks
from fedsim.run.simulation import Simulation
from fedsim.world import square_rows

SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=", "eval.every=0",
         "model.lora_r=64", "wandb.mode=off"]  # fmt: skip


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte, less than two checkpoints of the run below."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("this user may not mount a file system, so that no small disk can be made")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def simulation(folder: Path, tmp_path: Path, *overrides: str) -> Simulation:
    square = tmp_path / "square.json"
    square.write_text(json.dumps(square_rows()[:150]), encoding="utf-8")
    places = [f"data.square={square}", f"record.dir={folder}", f"record.artefacts={tmp_path / 'artefacts'}"]
    return Simulation(load_config(SMALL, [*BRIEF, *places, *overrides]), World(OneRank(), torch.device("cpu"), True))


def outcome(made: Simulation) -> list[object]:
    return [
        file_digest(made.record.folder / "adapter" / "adapter_model.safetensors"),
        decided_rows(read_rows(made.record.metrics_file)),
    ]


@pytest.mark.deep
def test_a_run_whose_disk_fills_up_goes_on_once_there_is_space(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk had room when the run was checked, and something else took it."""
    monkeypatch.setattr(checks, "check_disk", lambda *args: DiskRoom(0, 0, 0, small_disk))
    with pytest.raises(
        DiskFullError, match=rf"no room for what is to be written \([\d,]+ bytes free at {small_disk}"
    ) as caught:
        simulation(small_disk, tmp_path).run()
    assert "start the same command again" in str(caught.value) and "\n" not in str(caught.value)
    stopped = simulation(small_disk, tmp_path)
    kept = sorted(p.name for p in stopped.record.checkpoints.folder.iterdir())
    assert kept == ["round-000001"], "the finished round is whole, and nothing half-written is left"
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    stopped.run()
    straight = simulation(tmp_path / "straight", tmp_path)
    straight.run()
    assert outcome(stopped) == outcome(straight)


def test_a_disk_that_is_full_at_the_start_is_one_error(small_disk: Path, tmp_path: Path) -> None:
    """Even the run directory's configuration cannot be written."""
    made = simulation(small_disk, tmp_path)
    made.record.folder.mkdir(parents=True)
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(4_000_000))
    with pytest.raises(FedsimError, match=r"no room for what is to be written|No space left") as caught:
        made.run()
    assert str(small_disk) in str(caught.value) and "\n" not in str(caught.value)


def test_every_librarys_error_is_known(small_disk: Path) -> None:
    with pytest.raises(SafetensorError) as tensors:
        save_file({"zeros": torch.zeros(1_000_000)}, str(small_disk / "a"))
    with pytest.raises(OSError, match="No space") as text:
        (small_disk / "b").write_text("x" * 4_000_000)
    assert is_disk_full(tensors.value) and is_disk_full(text.value)
    assert isinstance(to_picklable(tensors.value, Journal(1)), DiskFullError)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (DataError("no"), PermissionError(errno.EACCES, "no"), KeyError("No space left on device")):
        with pytest.raises(type(error)) as caught, explaining_full_disk([tmp_path]):
            raise error
        assert caught.value is error and not is_disk_full(error)


def test_a_full_quota_and_a_cause_count_too(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=f"bytes free at {tmp_path}"), explaining_full_disk([tmp_path, Path("/no")]):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("cannot save") from error
