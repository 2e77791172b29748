"""Formulas piece by piece: the bits of the formula on whole fp64 vectors, rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.federation import elementwise as module
from fedsim.federation.elementwise import all_finite, elementwise, pieces


@pytest.mark.parametrize("piece", [1, 3, 10, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_the_whole_vector(monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    x, total = torch.randn(10), torch.randn(10, dtype=dtype)
    first, second = elementwise(lambda a, b: (a + b / 3, a * b), x, total, num_results=2)
    assert torch.equal(first, (x.double() + total.double() / 3).float())
    assert torch.equal(second, (x.double() * total.double()).float())


def test_results_are_new_and_fp32() -> None:
    x = torch.randn(4, dtype=torch.float64)
    (same,) = elementwise(lambda a: (a,), x)
    assert same.dtype == torch.float32 and same.data_ptr() != x.data_ptr()
    (empty,) = elementwise(lambda a: (a + 1,), torch.empty(0))
    assert empty.shape == (0,)


def test_pieces_are_views_that_cover_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    total, vector = torch.zeros(19), torch.arange(19.0)
    sizes = []
    for part, other in pieces(total, vector):
        part.add_(other)
        sizes.append(len(part))
    assert torch.equal(total, vector) and sizes == [8, 8, 3]
    with pytest.raises(ValueError, match="zip"):
        list(pieces(total, torch.zeros(3)))


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_all_finite(values: list[float]) -> None:
    vector = torch.tensor(values)
    assert bool(all_finite(vector)) == bool(torch.isfinite(vector).all())
