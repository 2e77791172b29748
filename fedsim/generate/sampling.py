"""Sampling of one token per row from its logits and its uniform number."""

from __future__ import annotations

import torch

from fedsim.fused.ops import OPS, runs_fused
from fedsim.kernels import sampling


def pick(
    logits: torch.Tensor,
    largest: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    kinds: set[bool],
) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: ``[rows, vocabulary]``.
        largest: ``[rows, 1]``: the largest logit of each row.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperatures: fp64 ``[rows]``; 0 takes the argmax (the smallest id of equals).
        kinds: True where temperatures above 0 may occur, False where 0 may; both if both may. Known
            on the host, so that nothing waits for the device.

    Returns:
        int64 ``[rows]``. Of logits without a largest number (NaN, +∞) any token.
    """
    if kinds == {False}:
        return logits.argmax(dim=-1)
    if kinds == {True}:
        return sample(logits, largest, uniforms, temperatures)
    # Rows of both kinds: sample all of them, then put the argmax into greedy ones.
    is_greedy = temperatures == 0  # bool [rows]
    drawn = sample(logits, largest, uniforms, temperatures.masked_fill(is_greedy, 1.0))
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


def sample(
    logits: torch.Tensor,
    largest: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
) -> torch.Tensor:
    """Sample one token per row as :func:`fedsim.kernels.sampling.sample` does, fused on CUDA."""
    if not runs_fused(logits.device):
        return sampling.sample(logits, largest, uniforms, temperatures)
    logits = logits.contiguous()
    # Two kernels: sums of probabilities by block of the vocabulary, then the draw in one block.
    sums = OPS.block_sums(logits, largest, temperatures)
    tokens: torch.Tensor = OPS.draw_in_block(logits, largest, temperatures, uniforms, sums)
    return tokens
