"""One token per row from its logits and its uniform number."""

from __future__ import annotations

from typing import Final

import torch

BLOCK: Final = 256
"""Weights are summed by blocks of so many tokens: the block is found first, then the token inside it."""


def pick(
    logits: torch.Tensor, largest: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor, kinds: set[bool]
) -> torch.Tensor:
    """One token per row.

    Args:
        logits: ``[rows, vocabulary]``.
        largest: ``[rows, 1]``: the largest of each row.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperatures: fp64 ``[rows]``; 0 takes the argmax (the smallest id of equals).
        kinds: whether temperatures are above 0: the answers that rows of this batch may give, known without asking the
            device.

    Returns:
        int64 ``[rows]``. Of logits without a largest number (NaN, +∞) any token.
    """
    if kinds == {False}:
        return logits.argmax(dim=-1)
    if kinds == {True}:
        return sample(logits, largest, uniforms, temperatures)
    is_greedy = temperatures == 0
    drawn = sample(logits, largest, uniforms, temperatures.masked_fill(is_greedy, 1.0))
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


def sample(
    logits: torch.Tensor, largest: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """The inverse of the cumulative distribution at the row's uniform number: arguments as of :func:`pick`.

    Probabilities are added up as 64-bit integers, so that the sums are the same in any order, as exact mode wants them
    of a GPU: a token's weight is ⌊2^b · p / p_max⌋ with b = 62 − ⌈log2 vocabulary⌉ (45 bits at a vocabulary of 128 K).
    """
    rows, size = logits.shape
    num_blocks = -(-size // BLOCK)
    scale = temperatures[:, None]
    scaled = logits.new_full((rows, num_blocks * BLOCK), -torch.inf, dtype=torch.float64)
    torch.div(logits, scale, out=scaled[:, :size])
    scaled.sub_(largest.double() / scale).exp_().mul_(2.0 ** (62 - (size - 1).bit_length()))
    weights = scaled.to(torch.int64).view(rows, num_blocks, BLOCK)
    ends = weights.sum(dim=-1).cumsum(dim=-1)  # [rows, blocks]: sums of all weights up to a block's end
    total = ends[:, -1]
    level = torch.minimum((uniforms * total.double()).to(torch.int64), total - 1)[:, None]
    block = torch.searchsorted(ends, level, right=True).clamp_(0, num_blocks - 1)  # [rows, 1]
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1)  # [rows, BLOCK]
    rest = level - (ends.gather(1, block) - inside[:, -1:])
    token = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return token[:, 0].clamp_(0, size - 1)
