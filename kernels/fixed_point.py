"""Order-independent sums of floating-point numbers, as 64-bit integers with a shared scale.

Integer addition is associative, so a sum does not depend on the grouping or order of its terms.
With ``count`` terms whose absolute values are at most ``bound`` < 2^e, the scale 2^s with
s = 62 − e − ⌈log2 count⌉ keeps every partial sum below 2^62. Rounding a term to the grid costs at
most 2^−(s+1), so the sum of n terms is within n · 2^−(s+1) of the exact one, apart from two
roundings to fp64's 53 bits: of each product of a weight and a term, and of the sum when it is
returned. A term of 24 significant bits and at least 2^(24−s) in size is represented exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fedsim.base import reused

# fp64 numbers converted at a time by one CPU thread: 2 MiB. Waking the threads for an operation and
# waiting for them costs 5 to 10 µs: half as many numbers took 12 % longer, and eight times as many,
# which leave the L3 cache of 32 MiB, 55 %.
BLOCK = 1 << 18
CUDA_BLOCK = 1 << 23  # on a GPU: 64 MiB of scratch, few launches
MAX_TERMS = 8  # terms converted together


def shared_exponent(bound: torch.Tensor, count: int) -> torch.Tensor:
    """Exponent s of the scale 2^s for ``count`` terms of at most ``bound``.

    Args:
        bound: fp64 scalar or vector of largest absolute values; 0 is allowed.
        count: number of terms that are added, over all ranks (≥ 1).

    Returns:
        int32 of ``bound``'s shape, on its device.
    """
    assert count >= 1, "a sum has at least one term"
    exponent = torch.frexp(bound).exponent
    return (62 - math.ceil(math.log2(count)) - exponent).clamp(max=900).to(torch.int32)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in fp64 for −1022 ≤ exponent ≤ 1023, by the number's bits: exact on any device."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def accumulate(
    total: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    weights: Sequence[float],
    exponent: torch.Tensor,
) -> None:
    """Compute ``total = Σ round(vector · (weight · 2^exponent))``, halves to even, in one pass.

    The product is rounded to fp64 before it is rounded to the grid. A vector with a number that is
    not finite, or beyond the bound that ``exponent`` is for, gives undefined integers.

    Args:
        total: int64 ``[n]``, contiguous; overwritten.
        vectors: fp32, bf16 or fp64 ``[n]`` each, of any stride, on ``total``'s device; none give
            zeros.
        weights: one per vector.
        exponent: int32 scalar from :func:`shared_exponent` for a bound on ``|weight · vector|``, on
            the same device.
    """
    assert total.dtype == torch.int64 and total.is_contiguous() and len(vectors) == len(weights)
    assert all(vector.shape == total.shape for vector in vectors)
    accumulate_scaled(total, vectors, _factors(weights, exponent))


def add_up(
    total: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    weights: Sequence[float],
    exponent: torch.Tensor,
    bound: torch.Tensor,
) -> torch.Tensor:
    """Do :func:`accumulate` and :func:`restore` in one pass, for a sum to which no other rank adds.

    Arguments are those of the two.

    Returns:
        fp64 ``[n]`` in ``total``'s memory.
    """
    if total.is_cuda:  # one more pass, but fewer kernels
        accumulate(total, vectors, weights, exponent)
        return restore(total, exponent, bound)
    scale = _scale(exponent, bound)
    for part in _accumulated(total, vectors, _factors(weights, exponent)):
        _restore(part, scale)
    return total.view(torch.float64)


def accumulate_scaled(
    total: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    factors: torch.Tensor,
) -> None:
    """Do the pass of :func:`accumulate` with given factors.

    Args:
        factors: weight · 2^exponent of each vector, fp64 ``[len(vectors)]``.
    """
    for _ in _accumulated(total, vectors, factors):
        pass


def restore(total: torch.Tensor, exponent: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Convert a sum to fp64 ``[n]``, ``total · 2^−exponent``, in ``total``'s memory.

    The integers are overwritten. All numbers are NaN if ``bound`` is not finite.
    """
    scale = _scale(exponent, bound)
    for part in total.split(_block_size(total.device)):
        _restore(part, scale)
    return total.view(torch.float64)


def _accumulated(
    total: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    factors: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Fill ``total`` block by block; yield each block while it is in the CPU's cache."""
    # Scratch [terms converted together, columns], fp64.
    rows = min(max(1, len(vectors)), MAX_TERMS)
    size = max(1, _block_size(total.device) // rows)
    if not vectors:
        total.zero_()
    columns = min(size, total.numel())
    block = reused.empty(rows * columns, torch.float64, total.device).view(rows, columns)

    for start in range(0, total.numel(), size):
        part = total[start : start + size]
        for first in range(0, len(vectors), MAX_TERMS):
            # Scale and round a group of terms, then add their integers.
            group = vectors[first : first + MAX_TERMS]
            terms = block[: len(group), : part.numel()]
            for row, vector in zip(terms, group, strict=True):
                row.copy_(vector[start : start + size])
            terms.mul_(factors[first : first + MAX_TERMS, None]).round_()
            integers = terms.view(torch.int64)
            integers.copy_(terms)  # in place: both are 64 bits wide
            if first == 0:
                torch.sum(integers, 0, out=part)
            else:
                part.add_(integers.sum(0))
        yield part


def _restore(integers: torch.Tensor, scale: torch.Tensor) -> None:
    """Convert integers to fp64 in place, times ``scale``."""
    sums = integers.view(torch.float64)
    sums.copy_(integers)
    sums.mul_(scale)


def _factors(weights: Sequence[float], exponent: torch.Tensor) -> torch.Tensor:
    """weight · 2^exponent, fp64 ``[len(weights)]`` on the exponent's device."""
    factors = torch.tensor(weights, dtype=torch.float64).to(exponent.device, non_blocking=True)
    return factors * power_of_two(exponent)


def _scale(exponent: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """2^−exponent, NaN where ``bound`` is not finite."""
    return torch.where(torch.isfinite(bound), power_of_two(-exponent), torch.nan)


def _block_size(device: torch.device) -> int:
    """Number of fp64 numbers to work on at a time."""
    if device.type == "cuda":
        return CUDA_BLOCK
    return BLOCK * torch.get_num_threads()
