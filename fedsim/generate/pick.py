"""One token per row from its logits and its uniform number."""

from __future__ import annotations

import torch


def pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """The inverse of the cumulative distribution at the row's uniform number, in fp64.

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperature: 0 takes the argmax (the smallest id of equals).

    Returns:
        int64 ``[rows]``.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = logits.double().div_(temperature)
    cumulative = cumulative.sub_(cumulative.amax(dim=-1, keepdim=True)).exp_().cumsum_(dim=-1)  # not normalised
    level = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
