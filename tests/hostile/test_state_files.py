"""What a run left behind, damaged in any way: read back bit for bit, passed over aloud or one error naming it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import CheckpointError, DataError
from fedsim.base.ranks import OneRank
from fedsim.federation.algorithms import ServerState
from fedsim.federation.client_state import ClientStateStore
from fedsim.record.checkpoint import Checkpoint, CheckpointStore
from fedsim.record.manifest import read_manifest
from fedsim.record.metrics import MetricLog, read_rows
from fedsim.record.outcomes import read_items, write_items
from fedsim.report.finished import FinishedRun
from tests.hostile.conftest import as_json, cases, damaged, misshapen, result

SIZE = 12


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory) -> pytest.TempPathFactory:
    """A new folder for each case."""
    return tmp_path_factory


MISHAPS = ["damage", "digit", "digit", "empty", "missing", "folder", "swap"]


def mishap(data: st.DataObject, path: Path, other: Path) -> None:
    """Something happens to ``path``; ``other`` is a whole file of the same kind."""
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(MISHAPS))
    if kind == "damage":
        path.write_bytes(data.draw(damaged(whole)))
    elif kind == "digit":  # the file stays well-formed and says something else
        places = [i for i, byte in enumerate(whole) if chr(byte).isdigit() and byte < 128]
        if places:
            i = data.draw(st.sampled_from(places))
            path.write_bytes(whole[:i] + b"9876543210"[whole[i] - 48 : whole[i] - 47] + whole[i + 1 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()


def checkpoint(round_idx: int) -> Checkpoint:
    g = torch.Generator().manual_seed(round_idx)
    adapter, control = torch.randn(2, SIZE, generator=g)
    return Checkpoint(round_idx, ServerState(adapter, {"control": control}, 3 + round_idx), {1: round_idx}, (0.1,))


def facts(found: Checkpoint) -> list[Any]:
    vectors = {name: vector.tolist() for name, vector in found.state.named().items()}
    return [found.round_idx, vectors, found.state.num_steps, dict(found.client_rounds), found.seconds_per_token]


@cases(150)
@given(data=st.data())
def test_a_damaged_checkpoint_is_passed_over_or_whole(folders: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = folders.mktemp("checkpoints")
    store = CheckpointStore(folder, keep=3)
    for i in range(2):
        store.save(checkpoint(i))
    newest, before = folder / "round-000002", folder / "round-000001"
    name = data.draw(st.sampled_from(["checkpoint.json", "state.safetensors"]))
    mishap(data, newest / name, before / name)
    said: list[str] = []
    found = store.load(said.append)
    assert found is not None
    assert facts(found) == facts(checkpoint(found.round_idx)), "never a mixture"
    assert [str(newest) in line and len(line.splitlines()) == 1 for line in said] == [True] * (1 - found.round_idx)
    shutil.rmtree(before)
    again = result(lambda: store.load(said.append), str(folder))
    assert (again is None) == (found.round_idx == 0)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(checkpoint(0))
    shutil.copytree(tmp_path / "round-000001", tmp_path / "round-000007")
    said: list[str] = []
    found = store.load(said.append)
    assert found is not None and found.round_idx == 0
    assert "round-000007: holds the checkpoint round-000001" in said[0]


@cases(120)
@given(data=st.data())
def test_a_damaged_control_variate_is_an_error_or_whole(folders: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = folders.mktemp("clients")
    store = ClientStateStore(folder)
    vectors = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    for client, round_idx, vector in zip((1, 2, 1), (4, 4, 3), vectors, strict=True):
        store.save(client, round_idx, vector)
    store.advance([1, 2], 4)
    path, *others = (folder / f"client{c:06d}-round{r + 1:06d}.safetensors" for c, r in ((1, 4), (2, 4), (1, 3)))
    kind = data.draw(st.sampled_from(["mishap", "mishap", "shape", "name", "type"]))
    if kind == "mishap":
        mishap(data, path, data.draw(st.sampled_from(others)))
    else:
        tensor = {"shape": torch.zeros(SIZE + 1), "name": torch.zeros(SIZE), "type": torch.zeros(SIZE).half()}[kind]
        save_file({"other" if kind == "name" else "control": tensor}, str(path), metadata={"blake2b": "0" * 32})
    found = result(lambda: store.load(1), str(path))
    checked = result(lambda: store.check({1: 4}, SIZE), str(path))
    assert checked is None
    if found is not None:
        assert torch.equal(found, vectors[0]), "never another client's, nor an older one"


class Store:
    """A store with one artefact, and how often it was built."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.store = ArtefactStore(folder, OneRank(), self.said.append)
        self.built = 0

    def get(self, number: int) -> Path:
        def write(folder: Path, value: int) -> None:
            (folder / "sub").mkdir()
            (folder / "value.txt").write_text(str(value) * 50)
            (folder / "sub" / "more.txt").write_text(f"more {value}")

        def build() -> int:
            self.built += 1
            return number

        return self.store.get("kites", {"number": number}, 1, build, write).folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an artefact; of its note the meaning, as a line more or less in it does no harm."""
    files: dict[str, Any] = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    note = str(folder / "artefact.json")
    return files | {note: json.loads(files[note])}


@cases(100)
@given(data=st.data())
def test_a_damaged_artefact_is_built_anew(folders: pytest.TempPathFactory, data: st.DataObject) -> None:
    made = Store(folders.mktemp("artefacts"))
    one, two = made.get(1), made.get(2)
    name = data.draw(st.sampled_from(["artefact.json", "value.txt", "sub/more.txt"]))
    before = contents(one)
    if data.draw(st.integers(0, 9)) == 0:
        shutil.rmtree(one)
        shutil.copytree(two, one)
    else:
        mishap(data, one / name, two / name)
    assert made.get(1) == one
    assert contents(one) == before
    assert made.built in (2, 3)
    assert made.get(1) == one and made.built <= 3, "whole from then on"


ITEMS = {"advbench": {0: 1.0, 2: 0.0, 5: 1.0}, "mt_bench": {0: 10.0, 1: 7.5}}


@cases(100)
@given(data=st.data())
def test_damaged_items_are_an_error_or_well_formed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "items.csv"
    write_items(path, ITEMS)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = result(lambda: read_items(path), str(path))
    for values in (found or {}).values():
        assert values.dtype == np.float64 and len(values) and np.isfinite(values).all()


@cases(60)
@given(data=st.data())
def test_items_that_were_cut_are_never_taken_for_whole(folders: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Wherever the file ends: within a line it is malformed, between two lines its mean is not the run's figure."""
    folder = folders.mktemp("run")
    (folder / "items").mkdir()
    (folder / "config.yaml").write_text("name: kite\nfederation:\n  num_rounds: 1\n")
    (folder / "manifest.json").write_text('{"started": {"num_ranks": 1}, "inputs": {}, "models": {}}')
    (folder / "summary.md").write_text("done")
    values = {"advbench": {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}}
    row = {"round": 1, "stage": "eval", "point": "global", "eval/advbench": 25.0}
    end = {"round": 1, "stage": "round"}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(end) + "\n")
    path = folder / "items" / "round1-global.csv"
    write_items(path, values)
    whole = path.read_bytes()
    assert FinishedRun.read(folder).items("global", "advbench") is not None
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    found = result(lambda: FinishedRun.read(folder).items("global", "advbench"), str(path))
    assert found is None


ROWS = [
    {"round": 0, "stage": "eval", "point": "pretrained", "eval/x": 1.0},
    {"round": 1, "stage": "round", "time/train_s": 0.25, "note": "Zürich"},
]


@cases(120)
@given(data=st.data())
def test_damaged_metrics_are_an_error_or_rows(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(whole)))
    else:
        path.write_bytes(b"".join(as_json(row) + b"\n" for row in [data.draw(misshapen(ROWS[0])), ROWS[1]]))
    for torn in (False, True):
        for row in result(lambda torn=torn: read_rows(path, torn), str(path)) or []:
            assert type(row["round"]) is int and isinstance(row["stage"], str)
            assert all(value is None or isinstance(value, bool | int | float | str) for value in row.values())


@cases(60)
@given(end=st.integers(0, 200))
def test_a_log_that_a_crash_cut_is_cut_back_to_whole_rows(tmp_path: Path, end: int) -> None:
    """Also within a character."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)[:end])
    MetricLog(path).truncate_after(5)
    assert read_rows(path) == ROWS[: len(read_rows(path))]


@cases(60)
@given(data=st.data())
def test_a_damaged_manifest(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "manifest.json"
    whole = {"inputs": {"square": {"path": "x", "sha256": "0" * 64}}, "models": {"model": "1" * 64}, "resumed": []}
    path.write_bytes(data.draw(st.one_of(damaged(as_json(whole)), misshapen(whole).map(as_json))))
    found = result(lambda: read_manifest(path), str(path))
    if found is not None:
        assert all(isinstance(entry["sha256"], str) for entry in found["inputs"].values())


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: read_rows(tmp_path / "metrics.jsonl"), CheckpointError),
        (lambda: read_items(tmp_path / "items.csv"), DataError),
        (lambda: read_manifest(tmp_path / "manifest.json"), CheckpointError),
        (lambda: CheckpointStore(tmp_path, 1).read(3), CheckpointError),
    ]
    for call, kind in calls:
        with pytest.raises(kind, match=str(tmp_path)):
            call()
