"""Checkpoints: a round trip, the newest whole one after damage, only so many kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedsim.base.artefacts import SEAL, digest_of
from fedsim.base.errors import CheckpointError
from fedsim.base.version import made_by, maker
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import ServerState, build_algorithm
from fedsim.record.checkpoint import FORMAT, Checkpoint, CheckpointStore


def made(round_idx: int, names: tuple[str, ...] = ("control",)) -> Checkpoint:
    g = torch.Generator().manual_seed(round_idx)
    adapter, *rest = torch.randn(1 + len(names), 50, generator=g)
    state = ServerState(adapter, dict(zip(names, rest, strict=True)), num_steps=3 * round_idx)
    return Checkpoint(round_idx, state, {3: round_idx, 11: 0}, (1e-4 / 3, 2.5e-4))


def same(one: Checkpoint, two: Checkpoint | None) -> bool:
    assert two is not None
    first, second = one.state.named(), two.state.named()
    assert first.keys() == second.keys() and one.state.num_steps == two.state.num_steps
    assert all(torch.equal(vector, second[name]) for name, vector in first.items())
    facts = [(c.round_idx, dict(c.client_rounds), c.seconds_per_token) for c in (one, two)]
    return facts[0] == facts[1]


@pytest.mark.parametrize("names", [(), ("control",), ("momentum", "second_moment")])
def test_round_trip_of_whatever_vectors_there_are(tmp_path: Path, names: tuple[str, ...]) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.load(print) is None
    store.save(made(4, names))
    said: list[str] = []
    assert same(made(4, names), store.load(said.append)) and said == []


def test_one_that_does_not_fit_is_passed_over_and_named(tmp_path: Path) -> None:
    """A whole checkpoint of another algorithm or of an adapter of another size is of no use to the run."""
    adam = build_algorithm(FederationConfig(algorithm="fedadam"), ServerOptimizerConfig())
    store = CheckpointStore(tmp_path, 3)
    store.save(made(0, ("momentum", "second_moment")))
    store.save(made(1, ("momentum",)))
    store.save(made(2, ("momentum", "second_moment", "control")))
    said: list[str] = []
    found = store.load(said.append, lambda checkpoint: adam.check(checkpoint.state, 50))
    assert same(made(0, ("momentum", "second_moment")), found)
    assert "round-000003: the server's state has an unknown vector control; it is passed over" in said[0]
    assert "round-000002: the server's state lacks vector second_moment; the one before it is used" in said[1]
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        store.load(said.append, lambda checkpoint: adam.check(checkpoint.state, 51))
    assert "vector adapter is torch.float32 [50], not torch.float32 [51]" in said[-1]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep)
    for i in range(12):
        store.save(made(i))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"round-{i + 1:06d}" for i in range(12 - keep, 12)]
    assert same(made(11), store.load(print))
    assert store.kept_client_rounds() == [{3: i, 11: 0} for i in range(12 - keep, 12)]


def damage(folder: Path, how: str) -> None:
    if how == "bit":
        data = bytearray((folder / "state.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "state.safetensors").write_bytes(bytes(data))
    elif how == "cut":
        (folder / "state.safetensors").write_bytes(b"")
    elif how == "missing":
        (folder / "state.safetensors").unlink()
    else:
        (folder / "checkpoint.json").write_text({"note": "{", "list": "[]", "empty": "{}"}[how])


@pytest.mark.parametrize("how", ["bit", "cut", "missing", "note", "list", "empty"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, how: str) -> None:
    store = CheckpointStore(tmp_path, 3)
    for i in range(3):
        store.save(made(i))
    damage(tmp_path / "round-000003", how)
    said: list[str] = []
    assert same(made(1), store.load(said.append))
    assert len(said) == 1 and "round-000003" in said[0] and "the one before it is used" in said[0]
    damage(tmp_path / "round-000001", how)
    damage(tmp_path / "round-000002", how)
    said.clear()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        store.load(said.append)
    assert len(said) == 3 and not any("is used" in line for line in said), "none is used"


def rewrite(folder: Path, **changes: object) -> None:
    """Change entries of a checkpoint's note; None takes one out."""
    note = json.loads((folder / "checkpoint.json").read_text()) | changes
    left = {name: value for name, value in note.items() if value is not None}
    left[SEAL] = digest_of({name: value for name, value in left.items() if name != SEAL})
    (folder / "checkpoint.json").write_text(json.dumps(left))


def test_another_format_is_refused_with_its_maker(tmp_path: Path) -> None:
    """Neither read nor passed over: falling back would lose rounds that are whole."""
    store = CheckpointStore(tmp_path, 3)
    store.save(made(0))
    store.save(made(1))
    assert json.loads((tmp_path / "round-000002" / "checkpoint.json").read_text())["made_by"] == made_by()
    other = {"fedsim": "9.8.7", "git": {"commit": "abcdef0123456789", "modified": False}}
    rewrite(tmp_path / "round-000002", format=FORMAT + 1, made_by=other)
    said: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        store.load(said.append)
    assert said == [] and "\n" not in str(caught.value)
    for part in ("round-000002", "fedsim 9.8.7, commit abcdef0123", f"format {FORMAT + 1}", "check out", "name=..."):
        assert part in str(caught.value)
    rewrite(tmp_path / "round-000002", format=None, made_by=None, round=None, round_idx=1)
    with pytest.raises(CheckpointError, match="a fedsim that has left no version in format 0"):
        store.load(said.append)
    assert store.kept_client_rounds() == [{3: 0, 11: 0}]


def test_another_version_of_the_same_format_is_gone_on_with(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 3)
    store.save(made(1))
    rewrite(tmp_path / "round-000002", made_by={"fedsim": "9.8.7", "git": None})
    said: list[str] = []
    assert same(made(1), store.load(said.append))
    assert said == [
        f"{tmp_path / 'round-000002'} was written by fedsim 9.8.7, commit unknown; {maker(made_by())} goes on"
    ]


def test_a_run_goes_on_past_damaged_checkpoints(tmp_path: Path) -> None:
    """After a fall-back, damaged newer ones may lie there still: the next rounds replace them one by one."""
    store = CheckpointStore(tmp_path, 3)
    for i in range(3):
        store.save(made(i))
    damage(tmp_path / "round-000002", "bit")
    damage(tmp_path / "round-000003", "cut")
    assert same(made(0), store.load(lambda text: None))
    store.save(made(1))
    assert store.kept_client_rounds() == [{3: 0, 11: 0}, {3: 1, 11: 0}], "whole ones alone"
    assert same(made(1), store.load(lambda text: None))
    store.save(made(2))
    assert len(store.kept_client_rounds()) == 3


def test_what_was_just_saved_is_never_dropped(tmp_path: Path) -> None:
    """Round 1 is whole, 2 and 3 are damaged, and fewer are kept than before: round 2 done again is the newest."""
    store = CheckpointStore(tmp_path, 3)
    for i in range(3):
        store.save(made(i))
    damage(tmp_path / "round-000002", "bit")
    damage(tmp_path / "round-000003", "cut")
    store = CheckpointStore(tmp_path, 1)
    assert same(made(0), store.load(lambda text: None))
    store.save(made(1))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000002"]
    assert same(made(1), store.load(print))


def test_a_save_that_was_cut_off_is_not_seen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    store.save(made(0))
    partial = tmp_path / ".round-000002.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    assert same(made(0), store.load(print))
    store.save(made(1))
    assert same(made(1), store.load(print)) and not partial.exists()
    store.save(made(1, ()))
    assert same(made(1, ()), store.load(print)), "a round may be saved again"


def test_clearing_away_asks_the_notes_alone(tmp_path: Path) -> None:
    """Every round does it: neither vectors nor checksums are read, and what has no note needs no control variate."""
    store = CheckpointStore(tmp_path, 3)
    for round_idx in range(3):
        store.save(made(round_idx))
    for folder in tmp_path.iterdir():
        (folder / "state.safetensors").unlink()
    (tmp_path / "round-000002" / "checkpoint.json").write_text('{"client_rounds": [')
    assert store.kept_client_rounds() == [{3: 0, 11: 0}, {3: 2, 11: 0}]
