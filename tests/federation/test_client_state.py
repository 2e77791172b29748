"""Control variates on disk: a round never touches older files, and errors name the client."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsim.errors import CheckpointError
from fedsim.federation.client_state import ClientStateStore


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
    (tmp_path / "client000009-round000000.partial").write_bytes(b"cut")
    store.drop_unused([{1: 1, 2: 1}, {1: 2, 2: 1}])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "client000001-round000001.safetensors",
        "client000001-round000002.safetensors",
        "client000002-round000001.safetensors",
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
    path = tmp_path / "client000005-round000002.safetensors"
    save_file({"control": torch.zeros(100, dtype=torch.bfloat16)}, str(path), metadata={"blake2b": ""})
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16, not torch\.float32"):
        store.load(5)
