"""Control variates on disk: a round never touches older files, and errors name the client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedsim.base.errors import CheckpointError
from fedsim.base.ranks import OneRank
from fedsim.config import FailuresConfig, LocalConfig
from fedsim.federation import client_state
from fedsim.federation.algorithms import ClientOutcome, ServerState
from fedsim.federation.client_state import ClientStateStore
from fedsim.parallel.world import World
from fedsim.run.cohort import CohortRunner
from tools.client_scale import peak_growth


def test_round_trip_and_index(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path / "deep" / "state")
    assert store.load(3) is None
    old, new = torch.randn(9), torch.randn(9)
    store.save(3, 0, old)
    assert store.load(3) is None, "a file counts once the round has ended"
    store.advance([3], 0)
    store.save(3, 4, new)
    found = store.load(3)
    assert found is not None and torch.equal(found, old)
    store.advance([3], 4)
    assert torch.equal(store.load(3), new)  # type: ignore[arg-type]
    assert torch.equal(ClientStateStore(store.folder, {3: 0}).load(3), old)  # type: ignore[arg-type]


def test_only_named_files_are_kept(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    for client, round_idx in ((1, 0), (1, 1), (1, 2), (2, 1), (7, 0)):
        store.save(client, round_idx, torch.zeros(2))
    (tmp_path / "client000009-round000001.partial").write_bytes(b"cut")
    store.drop_unused([{1: 1, 2: 1}, {1: 2, 2: 1}])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "client000001-round000002.safetensors",
        "client000001-round000003.safetensors",
        "client000002-round000002.safetensors",
    ]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "one number"])
def test_a_missing_or_damaged_file_is_an_error(tmp_path: Path, damage: str) -> None:
    store = ClientStateStore(tmp_path)
    store.save(5, 2, torch.zeros(100))
    store.advance([5], 2)
    store.check({5: 2}, 100)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = {"cut": whole[:50], "empty": b"", "one number": whole[:-4] + b"\x00\x00\x80\x3f"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(broken[damage])
    words = "does not match its checksum" if damage == "one number" else "cannot be read"
    for read in (lambda: store.load(5), lambda: ClientStateStore(tmp_path).check({5: 2}, 100)):
        with pytest.raises(CheckpointError, match=rf"control variate of client 5 {words}"):
            read()


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.zeros(99), r"has shape \[99\], not \[100\]"),
        (torch.zeros(1, 100), r"has shape \[1, 100\], not \[100\]"),
        (torch.zeros(100, dtype=torch.float64), "is torch.float64, not torch.float32"),
        (torch.zeros(100, dtype=torch.int32), "is torch.int32, not torch.float32"),
    ],
)
def test_a_whole_file_of_another_shape_or_type_is_an_error(tmp_path: Path, vector: torch.Tensor, words: str) -> None:
    store = ClientStateStore(tmp_path)
    store.save(5, 2, vector)
    with pytest.raises(CheckpointError, match=rf"control variate of client 5 {words}"):
        store.check({5: 2}, 100)


def test_a_type_that_has_no_checksum_is_an_error(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path, {5: 2})
    path = tmp_path / "client000005-round000003.safetensors"
    save_file({"control": torch.zeros(100, dtype=torch.bfloat16)}, str(path), metadata={"blake2b": ""})
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16, not torch\.float32"):
        store.load(5)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_a_thousand_clients_is_that_of_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all, as a resume's check does, and as a cohort does one by one; one file stands for all by hard links."""
    clients, size = 1000, 250_000
    digest = client_state._digest
    monkeypatch.setattr(client_state, "_digest", lambda vector, name: digest(vector, "whatever its name"))
    store = ClientStateStore(tmp_path)
    store.save(0, 0, torch.randn(size))
    for client in range(1, clients):
        os.link(store._path(0, 0), store._path(client, 0))
    index = dict.fromkeys(range(clients), 0)
    store.advance(index, 0)
    few = 20 * 4 * size  # bytes of 20 clients; other libraries' own allocations come and go
    assert peak_growth(lambda: store.check(index, size)) < few
    assert peak_growth(lambda: [store.load(client) is None for client in range(clients)]) < few
    assert peak_growth(lambda: [store.load(client) for client in range(50)]) > few, "what is held shows"


def test_a_mapped_control_variate_is_the_readers_own(tmp_path: Path) -> None:
    """Changing what was read leaves the file alone, and clearing the file away leaves what was read."""
    store = ClientStateStore(tmp_path, {5: 2})
    vector = torch.randn(5000)
    store.save(5, 2, vector)
    first, second = store.load(5), store.load(5)
    assert first is not None and second is not None
    first.mul_(2.0)
    assert torch.equal(store.load(5), vector)  # type: ignore[arg-type]
    store.drop_unused([])
    assert torch.equal(second, vector) and torch.equal(first, 2 * vector)


class Recruit:
    """A trainer whose clients do nothing but get a control variate each."""

    num_steps = 1
    local = LocalConfig(batch_size=4, micro_batch_size=2)

    def num_tokens(self, client: int, rows: Any, round_idx: int, num_steps: int) -> int:
        return 10

    def train(self, client: int, *rest: Any) -> ClientOutcome:
        one = torch.full((3,), float(client))
        return ClientOutcome(client, 1, 1.0, one, one + 1, one, 0.5, 0.5, 10, 0.1)


def test_a_round_holds_no_control_variate_that_is_on_disk(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    world = World(OneRank(), torch.device("cpu"), exact=True)
    runner = CohortRunner(world, Recruit(), [[]] * 6, store, FailuresConfig(), wide_lanes=False)  # type: ignore[arg-type]
    work = runner.train({1: 1, 4: 1}, 7, ServerState(torch.zeros(3), {}, 0), [1e-4])
    assert all(o.control is None and o.control_delta is not None for o in [*work.outcomes, *work.reporting])
    store.advance([1, 4], 7)
    assert [store.load(client).tolist() for client in (1, 4)] == [[2.0] * 3, [5.0] * 3]  # type: ignore[union-attr]
