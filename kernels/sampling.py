"""Sampling of a token per row by 64-bit integer weights, in plain torch: the kernels' reference."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 256
"""Tokens of a block whose weights are summed: the block is found first, then the token in it."""


def sample(logits: Tensor, largest: Tensor, uniforms: Tensor, temperatures: Tensor) -> Tensor:
    """Evaluate the inverse of the cumulative distribution at each row's uniform number.

    Probabilities are summed as 64-bit integers, so that the sums are the same in any order, which
    exact mode requires of a GPU: a token's weight is ⌊2^b · p / p_max⌋ with b = 62 − ⌈log2
    vocabulary⌉ (45 bits at a vocabulary of 128 K).

    Args:
        logits: ``[rows, vocabulary]``.
        largest: ``[rows, 1]``: the largest of each row.
        uniforms: fp64 ``[rows]`` in [0, 1).
        temperatures: fp64 ``[rows]``, above 0.

    Returns:
        int64 ``[rows]``. Of logits without a largest number (NaN, +∞) any token.
    """
    weights = token_weights(logits, largest, temperatures)
    return _drawn(weights, weights.sum(dim=-1), uniforms, logits.shape[1])


def block_sums(logits: Tensor, largest: Tensor, temperatures: Tensor) -> Tensor:
    """Sums of :func:`token_weights` over each block, int64 ``[rows, blocks]``.

    Arguments as of :func:`sample`.
    """
    return token_weights(logits, largest, temperatures).sum(dim=-1)


def draw_in_block(
    logits: Tensor,
    largest: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    sums: Tensor,
) -> Tensor:
    """Sample as :func:`sample`, with known sums of blocks; needs only one block's weights a row.

    Args:
        sums: of :func:`block_sums`; other arguments as of :func:`sample`.
    """
    weights = token_weights(logits, largest, temperatures)
    return _drawn(weights, sums, uniforms, logits.shape[1])


def token_weights(logits: Tensor, largest: Tensor, temperatures: Tensor) -> Tensor:
    """Weight of each token, int64 ``[rows, blocks, BLOCK]``; 0 behind the vocabulary's end."""
    rows, size = logits.shape
    num_blocks = -(-size // BLOCK)
    scale = temperatures[:, None]
    scaled = logits.new_full((rows, num_blocks * BLOCK), -torch.inf, dtype=torch.float64)
    torch.div(logits, scale, out=scaled[:, :size])
    scaled.sub_(largest.double() / scale).exp_().mul_(2.0 ** weight_bits(size))
    return scaled.to(torch.int64).view(rows, num_blocks, BLOCK)


def weight_bits(vocabulary: int) -> int:
    """Bits of the largest weight, so that the sum of all weights has at most 62."""
    return 62 - (vocabulary - 1).bit_length()


def _drawn(weights: Tensor, sums: Tensor, uniforms: Tensor, size: int) -> Tensor:
    """The token of each row in whose share of the summed weights its uniform number falls."""
    # The level among the weights, and its block [rows, 1].
    ends = sums.cumsum(dim=-1)  # [rows, blocks]: sums of all weights up to a block's end
    total = ends[:, -1]
    level = torch.minimum((uniforms * total.double()).to(torch.int64), total - 1)[:, None]
    block = torch.searchsorted(ends, level, right=True).clamp_(0, ends.shape[1] - 1)

    # The rest of the level among the block's weights [rows, BLOCK], and its token.
    chosen = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    inside = chosen.cumsum(dim=-1)
    rest = level - (ends.gather(1, block) - inside[:, -1:])
    token = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return token[:, 0].clamp_(0, size - 1)
