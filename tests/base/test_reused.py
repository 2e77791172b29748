"""Memory of long CPU vectors: used again once nothing refers to it, and never before."""

from __future__ import annotations

import gc

import pytest
import torch

from fedsim.base import reused

CPU = torch.device("cpu")
SIZE = reused.LEAST // 4 + 3


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "_free", {})


def test_memory_comes_back_only_when_the_last_view_is_gone() -> None:
    first = reused.empty(SIZE, torch.float32, CPU).fill_(3.0)
    place, view = first.data_ptr(), first[5:].view(-1, 2)
    del first
    gc.collect()
    other = reused.empty(SIZE, torch.float32, CPU).fill_(4.0)
    assert other.data_ptr() != place and bool((view == 3.0).all())
    del view
    again = reused.empty(SIZE, torch.float32, CPU)
    assert again.data_ptr() == place and bool((other == 4.0).all())


def test_an_array_over_a_vector_keeps_its_memory() -> None:
    array = reused.empty(SIZE, torch.float32, CPU).fill_(3.0).numpy()
    reused.empty(SIZE, torch.float32, CPU).fill_(4.0)
    assert bool((array == 3.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("size", [0, 1, SIZE, 2 * SIZE])
def test_vectors_are_as_those_of_torch(dtype: torch.dtype, size: int) -> None:
    vector = reused.empty(size, dtype, CPU)
    assert vector.shape == (size,) and vector.dtype == dtype and vector.is_contiguous()
    assert vector.data_ptr() % reused.ALIGNMENT == 0
    assert torch.equal(vector.fill_(7), torch.full((size,), 7, dtype=dtype))


def test_types_of_nearly_the_same_size_share_blocks_and_short_vectors_have_none() -> None:
    place = reused.empty(SIZE, torch.float32, CPU).data_ptr()
    assert reused.empty(SIZE // 2, torch.int64, CPU).data_ptr() == place
    reused.empty(reused.LEAST // 4 - 1, torch.float32, CPU)
    assert [len(blocks) for blocks in reused._free.values()] == [1]
