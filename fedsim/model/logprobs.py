"""Log-probabilities of target tokens, the one forward pass behind SFT, DPO and scoring."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedsim.attention.forward import Rows, causal_lm, packed_hidden, packed_logits
from fedsim.attention.head import head_logits
from fedsim.data.batch import Batch
from fedsim.fused.functions import pick
from fedsim.fused.ops import runs_fused

MAX_LOGITS: Final = 1 << 27
"""Logits that may be kept for a backward pass: 512 MiB in fp32, 1,046 targets of a vocabulary of 128,256."""

_HEAD_START: ContextVar[int] = ContextVar("first target of the chunk that the head computes", default=0)


def head_start() -> int:
    """Which of the batch's targets the LM head begins with: 0, or a later chunk's first, also when computed again."""
    return _HEAD_START.get()


def target_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of every target token.

    Only the tokens before targets go through the LM head (a 128 K vocabulary makes the head the largest activation of a
    step). Where that is still more than :data:`MAX_LOGITS`, the head is computed in chunks, and again in the backward
    pass.

    Args:
        model: a Hugging Face causal LM; its own soft-capping and scaling of logits apply.
        batch: on the model's device.

    Returns:
        fp32 (fp64 of a model in fp64) ``[targets]``, in the batch's order. Empty, with a zero gradient, where every
        reply was cut off.
    """
    spans, rows, targets = batch.spans, Rows(batch.spans), batch.target_ids
    chunk = max(1, MAX_LOGITS // int(causal_lm(model).config.get_text_config().vocab_size))
    if len(targets) <= chunk:
        return _picked(packed_logits(model, batch.input_ids, spans.positions, rows, batch.before_target), targets)
    hidden = packed_hidden(model, batch.input_ids, spans.positions, rows).index_select(0, batch.before_target)

    def logprobs(start: int, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        token = _HEAD_START.set(start)
        try:
            return _picked(head_logits(model, states), ids)
        finally:
            _HEAD_START.reset(token)

    # Dropout's draws are keyed (fedsim.train.dropout): there is no state of a generator to keep.
    parts = [
        checkpoint(logprobs, number * chunk, states, ids, use_reentrant=False, preserve_rng_state=False)
        for number, (states, ids) in enumerate(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    ]
    return torch.cat(parts)


def _picked(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log softmax at ``ids``, in fp32 or wider."""
    if runs_fused(logits.device):
        return pick(logits, ids)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.nll_loss(F.log_softmax(logits, dim=-1, dtype=wide), ids, reduction="none")
