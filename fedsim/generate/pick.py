"""One token per row from its logits and its uniform number."""

from __future__ import annotations

import torch


def pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """The inverse of the cumulative distribution at the row's uniform number, in fp64.

    A single row is computed twice: CUDA's scan of one row adds in an order that varies, that of several does not.

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperature: 0 takes the argmax (the smallest id of equals).

    Returns:
        int64 ``[rows]``. Of logits without a largest number (NaN, +∞) any token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    rows = logits.expand(max(len(logits), 2), -1)
    cumulative = rows.to(torch.float64, memory_format=torch.contiguous_format, copy=True).div_(temperature)
    cumulative = cumulative.sub_(cumulative.amax(dim=-1, keepdim=True)).exp_().cumsum_(dim=-1)  # not normalised
    cumulative = cumulative[: len(logits)]
    level = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
