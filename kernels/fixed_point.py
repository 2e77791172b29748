"""Order-independent sums: floating-point numbers as 64-bit integers with a shared power-of-two scale.

Integer addition is associative, so a sum does not depend on how its terms were grouped or who finished first. With
``count`` terms whose absolute values are at most ``bound`` < 2^e, the scale 2^s with s = 62 − e − ⌈log2 count⌉ keeps
every partial sum below 2^62. Rounding a term to the grid costs at most 2^−(s+1), so the sum of n terms is within
n · 2^−(s+1) of the exact one; a term of 24 significant bits and at least 2^(24−s) in size is represented exactly.
"""

from __future__ import annotations

import math

import torch

CHUNK = 1 << 20  # numbers converted at a time: bounds the fp64 scratch to 8 MiB


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


def accumulate(total: torch.Tensor, term: torch.Tensor, exponent: torch.Tensor, weight: float = 1.0) -> None:
    """``total += round(weight · term · 2^exponent)``, in place.

    Args:
        total: int64 ``[n]``.
        term: floating point ``[n]``; ``weight · term`` is formed in fp64.
        exponent: int32 scalar from :func:`shared_exponent` for a bound on ``|weight · term|``.
    """
    assert total.dtype == torch.int64 and total.shape == term.shape
    for start in range(0, total.numel(), CHUNK):
        part = term[start : start + CHUNK].double()
        if weight != 1.0:
            part = part * weight
        total[start : start + CHUNK] += torch.ldexp(part, exponent).round_().to(torch.int64)


def restore(total: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """The sum as fp64 ``[n]``: ``total · 2^−exponent``."""
    return torch.ldexp(total.double(), -exponent)
