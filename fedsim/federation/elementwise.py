"""Elementwise formulas on flat vectors, computed in fp64 piece by piece, so that no fp64 copy of a vector is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

PIECE = 1 << 15  # numbers that one CPU thread works on at a time: their fp64 pieces stay in its L2 cache
CUDA_PIECE = 1 << 22


def pieces(*vectors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Matching views of vectors of the same length."""
    size = CUDA_PIECE if vectors[0].is_cuda else PIECE * torch.get_num_threads()
    return zip(*(vector.split(size) for vector in vectors), strict=True)


def all_finite(vector: torch.Tensor) -> torch.Tensor:
    """Whether no entry is NaN or infinite, as a bool scalar on the vector's device: one pass, no mask."""
    return torch.isfinite(torch.stack(vector.aminmax())).all()


def elementwise(
    formula: Callable[..., tuple[torch.Tensor, ...]], *vectors: torch.Tensor, num_results: int = 1
) -> tuple[torch.Tensor, ...]:
    """``formula`` of the vectors, formed in fp64; each result is rounded once to fp32.

    Args:
        formula: takes one fp64 tensor per vector and returns ``num_results`` of the same shape; changes none in place.
        vectors: floating point ``[n]``.

    Returns:
        fp32 ``[n]`` each, in new memory.
    """
    results = tuple(torch.empty_like(vectors[0], dtype=torch.float32) for _ in range(num_results))
    for piece in pieces(*results, *vectors):
        values = formula(*(part.double() for part in piece[num_results:]))
        for result, value in zip(piece[:num_results], values, strict=True):
            result.copy_(value)
    return results
