"""Log-probabilities of target tokens, the one forward pass behind SFT, DPO and scoring."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fedsim.data.batch import Batch


def target_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of every target token, 0 elsewhere.

    Only the positions from the batch's first target on go through the LM head (a 128 K vocabulary makes the head the
    largest activation of a step).

    Args:
        model: a Hugging Face causal LM; its own soft-capping and scaling of logits apply.
        batch: on any device; moved to the model's.

    Returns:
        fp32 ``[rows, length − first_target]``: entry ``[i, j]`` belongs to token ``first_target + j`` of row ``i``.
    """
    device = next(model.parameters()).device
    first = batch.first_target
    ids = batch.input_ids.to(device, non_blocking=True)
    targets = batch.targets[:, first:].to(device, non_blocking=True)
    kept = max(ids.shape[1] - first, 1)
    logits = model(input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids, use_cache=False, logits_to_keep=kept).logits
    if targets.shape[1] == 0:
        return logits[:, :0, 0].float()  # empty, with a zero gradient: every reply was cut off
    wanted = ids[:, first:]
    negative = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    return torch.where(targets, -negative, torch.zeros_like(negative))
