"""One token per row from its logits and its uniform number."""

from __future__ import annotations

import torch


def pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """The inverse of the cumulative distribution at the row's uniform number.

    Probabilities are added up as 64-bit integers, so that the sums are the same in any order, as exact mode wants them
    of a GPU: a token's weight is ⌊2^b · p / p_max⌋ with b = 62 − ⌈log2 vocabulary⌉ (45 bits at a vocabulary of 128 K).

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperature: 0 takes the argmax (the smallest id of equals).

    Returns:
        int64 ``[rows]``. Of logits without a largest number (NaN, +∞) any token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    size = logits.shape[-1]
    scaled = logits.to(torch.float64, copy=True).div_(temperature)
    weights = scaled.sub_(scaled.amax(dim=-1, keepdim=True)).exp_().mul_(2.0 ** (62 - (size - 1).bit_length()))
    cumulative = weights.to(torch.int64).cumsum(dim=-1)
    total = cumulative[:, -1]
    level = torch.minimum((uniforms * total.double()).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, level[:, None], right=True)[:, 0].clamp(0, size - 1)
