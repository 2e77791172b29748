"""One token per row from its logits and its uniform number."""

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
    """One token per row.

    Args:
        logits: ``[rows, vocabulary]``.
        largest: ``[rows, 1]``: the largest of each row.
        uniforms: fp64 ``[rows]`` in [0, 1); unused at temperature 0.
        temperatures: fp64 ``[rows]``; 0 takes the argmax (the smallest id of equals).
        kinds: whether temperatures are above 0: the answers that rows of this batch may give, known
            without asking the device.

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
    logits: torch.Tensor,
    largest: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
) -> torch.Tensor:
    """See :func:`fedsim.kernels.sampling.sample`, which two kernels compute where the device has
    them.
    """
    if not runs_fused(logits.device):
        return sampling.sample(logits, largest, uniforms, temperatures)
    logits = logits.contiguous()
    sums = OPS.block_sums(logits, largest, temperatures)
    tokens: torch.Tensor = OPS.draw_in_block(logits, largest, temperatures, uniforms, sums)
    return tokens
