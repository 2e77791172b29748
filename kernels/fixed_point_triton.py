"""The accumulation of fixed-point sums in Triton: every term is read once, every integer written once.

The same bits as ``fixed_point.accumulate_torch``, its reference. Imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 1024  # numbers of a program
MAX_TERMS = 8  # terms of a launch: each number of terms is compiled for itself
INTEGERS = tl.constexpr(2.0**52)
OPTIONS = {"enable_fp_fusion": False}  # a fused multiply-add would skip the rounding to fp64


@triton.jit
def _accumulate_kernel(total, vectors, strides, factors, size, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    result = tl.full([BLOCK], 0, tl.int64)
    if ADD:
        result = tl.load(total + index, mask=inside, other=0)
    for t in tl.static_range(len(vectors)):
        vector = tl.load(vectors[t] + index * strides[t], mask=inside, other=0.0)
        value = vector.to(tl.float64) * tl.load(factors + t)
        # To the nearest integer, halves to even: from 2^52 on fp64 numbers lie 1 apart.
        size_of = tl.abs(value)
        nearest = tl.where(size_of < INTEGERS, (size_of + INTEGERS) - INTEGERS, size_of)
        result += tl.where(value < 0, -nearest, nearest).to(tl.int64)
    tl.store(total + index, result, mask=inside)


def accumulate(total: torch.Tensor, vectors: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
    """``total = Σ round(vector · factor)``, halves to even.

    Args:
        total: int64 ``[n]``, contiguous; overwritten.
        vectors: fp32, bf16 or fp64 ``[n]`` each, of any stride.
        factors: weight · 2^exponent of each vector, fp64 ``[len(vectors)]``.
    """
    if not vectors:
        total.zero_()
    if not total.numel():
        return
    grid = (triton.cdiv(total.numel(), BLOCK),)
    for first in range(0, len(vectors), MAX_TERMS):
        group = tuple(vectors[first : first + MAX_TERMS])
        _accumulate_kernel[grid](
            total,
            group,
            tuple(vector.stride(0) for vector in group),
            factors[first:],
            total.numel(),
            ADD=first > 0,
            BLOCK=BLOCK,
            **OPTIONS,
        )
