"""Modes of everything that a run leaves: what the umask says, whichever library writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim.base.ranks import OneRank
from fedsim.base.tensor_file import write_tensors
from fedsim.config import load_config
from fedsim.parallel.world import World
from fedsim.run.simulation import Simulation

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "tests" / "distributed" / "small.yaml"
BRIEF = ["federation.algorithm=scaffold", "federation.num_rounds=1", "cai.iterations=1", "local.steps=1",
         "eval.limit=1", "eval.guard_judge=none", "wandb.mode=offline"]  # fmt: skip


@pytest.fixture(
    params=[0o022, pytest.param(0o027, marks=pytest.mark.deep), pytest.param(0o077, marks=pytest.mark.deep)],
    ids=["022", "027", "077"],
)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Paths whose mode is another than the umask's, with it."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if not path.is_symlink() and (mode := path.stat().st_mode & 0o777) != wanted:
            found[str(path.relative_to(folder))] = f"{mode:o} instead of {wanted:o}"
    return found


def test_a_tensor_file_has_the_umasks_mode_and_safetensors_own_bytes(tmp_path: Path, umask: int) -> None:
    tensors = {"b": torch.randn(7), "a": torch.randn(3, 4)}
    for name, metadata in (("plain", None), ("noted", {"format": "pt"})):
        write_tensors(tmp_path / name, tensors, metadata)
        save_file(tensors, str(tmp_path / "other"), metadata=metadata)
        assert (tmp_path / name).read_bytes() == (tmp_path / "other").read_bytes()
        (tmp_path / "other").unlink()
    write_tensors(tmp_path / "plain", {"c": torch.zeros(2)})  # replaced
    assert load_file(str(tmp_path / "plain")).keys() == {"c"} and {p.name for p in tmp_path.iterdir()} == {
        "plain",
        "noted",
    }
    assert not {name: mode for name, mode in wrong_modes(tmp_path, umask).items() if name != "."}


def test_everything_that_a_run_leaves_has_the_umasks_mode(tmp_path: Path, umask: int) -> None:
    """Every stage: guard adapter, control variates, checkpoint, adapter, replies, W&B's files."""
    places = [f"record.dir={tmp_path / 'runs'}", f"record.artefacts={tmp_path / 'artefacts'}"]
    simulation = Simulation(load_config(SMALL, [*BRIEF, *places]), World(OneRank(), torch.device("cpu"), exact=True))
    simulation.run()
    written = {path.name for path in tmp_path.rglob("*")}
    assert {"adapter_model.safetensors", "state.safetensors", "summary.md", "loss.png"} <= written
    assert any(name.startswith("client0") for name in written) and any(name.startswith("guard-") for name in written)
    assert not wrong_modes(tmp_path / "runs", umask)
    assert not wrong_modes(tmp_path / "artefacts", umask)


def test_no_other_writer_makes_private_files() -> None:
    """``save_file`` and the temporary files of ``tempfile`` have mode 0600."""
    for path in (ROOT / "fedsim").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("save_file(", "mkstemp(", "NamedTemporaryFile(", "mkdtemp("):
            assert word not in source, f"{path}: {word}...) ignores the umask; use fedsim.base.tensor_file or open()"
