"""Log-probabilities of target tokens: the one forward pass of SFT, DPO and scoring."""

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
"""Most logits that are kept for a backward pass: 512 MiB in fp32, 1,046 rows of 128,256."""

_HEAD_START: ContextVar[int] = ContextVar("first target of the LM head's chunk", default=0)


def head_start() -> int:
    """Index of the batch's target with which the present chunk of the LM head begins.

    It is 0 without chunks. It is the same when a chunk is computed again in the backward pass.
    """
    return _HEAD_START.get()


def target_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of every target token.

    Only the tokens before targets go through the LM head (with a vocabulary of 128 K its output is
    the largest activation of a step). If that is still more than :data:`MAX_LOGITS`, the head is
    computed in chunks, and again in the backward pass.

    Args:
        model: a Hugging Face causal LM; its own soft-capping and scaling of logits apply.
        batch: on the model's device.

    Returns:
        fp32 (fp64 of a model in fp64) ``[targets]``, in the batch's order. Empty, with a zero
        gradient, where every reply was cut off.
    """
    positions, rows, targets = batch.spans.positions, Rows(batch.spans), batch.target_ids
    vocab_size = int(causal_lm(model).config.get_text_config().vocab_size)
    chunk = max(1, MAX_LOGITS // vocab_size)  # targets

    # All logits at once: [targets, vocabulary].
    if len(targets) <= chunk:
        logits = packed_logits(model, batch.input_ids, positions, rows, batch.before_target)
        return _picked(logits, targets)

    # In chunks, of which only the hidden states [targets, width] are kept.
    hidden = packed_hidden(model, batch.input_ids, positions, rows)
    hidden = hidden.index_select(0, batch.before_target)

    def logprobs(start: int, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        token = _HEAD_START.set(start)
        try:
            return _picked(head_logits(model, states), ids)
        finally:
            _HEAD_START.reset(token)

    # Dropout's draws are keyed (fedsim.train.dropout): there is no state of a generator to keep.
    parts = []
    start = 0
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        part = checkpoint(
            logprobs,
            start,
            states,
            ids,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        parts.append(part)
        start += chunk
    return torch.cat(parts)


def _picked(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log softmax of ``[targets, vocabulary]`` at ``ids``, ``[targets]`` in fp32 or wider."""
    if runs_fused(logits.device):
        return pick(logits, ids)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.nll_loss(F.log_softmax(logits, dim=-1, dtype=wide), ids, reduction="none")
