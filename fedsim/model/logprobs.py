"""Log-probabilities of target tokens, the one forward pass behind SFT, DPO and scoring."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fedsim.attention.forward import Rows, packed_logits
from fedsim.data.batch import Batch


def target_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of every target token.

    Only the tokens before targets go through the LM head (a 128 K vocabulary makes the head the largest activation of a
    step).

    Args:
        model: a Hugging Face causal LM; its own soft-capping and scaling of logits apply.
        batch: on the model's device.

    Returns:
        fp32 (fp64 of a model in fp64) ``[targets]``, in the batch's order. Empty, with a zero gradient, where every
        reply was cut off.
    """
    spans = batch.spans
    logits = packed_logits(model, batch.input_ids, spans.positions, Rows(spans), batch.before_target)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.nll_loss(F.log_softmax(logits, dim=-1, dtype=wide), batch.target_ids, reduction="none")
