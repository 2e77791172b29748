"""Logits of a few candidate tokens after prompts that share a long common head.

The head's keys and values are computed once and reused by every unit of rows; only the candidates' rows of the LM head
are multiplied. Rows are padded on the right: a causal model's real tokens never see what stands to their right, so the
padding changes no result, and with fixed units a row's result does not depend on the rank that computed it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, eq=False)
class Head:
    """The tokens that every prompt begins with, already read by the model.

    Attributes:
        length: number of tokens; 0 is an empty head.
        cache: their keys and values (batch of 1); never written to after :func:`read_head`.
    """

    length: int
    cache: DynamicCache


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """How many leading ids all ``prompts`` (int ``[length]`` each, none empty) share.

    Less than the shortest prompt's length, so that each keeps a tail of one token or more.
    """
    assert prompts, "a common head needs at least one prompt"
    first, shared = prompts[0], min(len(p) for p in prompts) - 1
    assert shared >= 0, "a prompt has at least one token"
    for prompt in prompts[1:]:
        differs = np.flatnonzero(prompt[:shared] != first[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


@torch.no_grad()
def read_head(model: nn.Module, ids: np.ndarray) -> Head:
    """Compute the keys and values of the common head.

    Args:
        model: a causal LM, PEFT-wrapped or not, in eval mode. Weights or adapter must not change
            while the head is in use.
        ids: int ``[length]``, may be empty.
    """
    assert not model.training, "scoring needs eval mode: dropout would make the head random"
    causal = _causal_lm(model)
    cache = DynamicCache(config=causal.config)
    if len(ids):
        tokens = torch.from_numpy(ids.astype(np.int64))[None].to(causal.device)
        causal.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return Head(len(ids), cache)


@torch.no_grad()
def candidate_logits(
    model: nn.Module, head: Head, tails: Sequence[np.ndarray], candidates: Sequence[int], pad_id: int
) -> torch.Tensor:
    """Logits of ``candidates`` as the token that follows each prompt ``head + tail``.

    Args:
        model: the model that read ``head``, unchanged since, in eval mode.
        tails: int ``[length]`` each, none empty.
        candidates: token ids.
        pad_id: any valid id; the result does not depend on it.

    Returns:
        float32 ``[len(tails), len(candidates)]`` on the CPU. Hidden states and head rows are multiplied in float32.
    """
    assert not model.training, "scoring needs eval mode: dropout would make logits random"
    assert tails and all(len(t) for t in tails), "each prompt needs a tail of one token or more"
    causal = _causal_lm(model)
    lengths = torch.tensor([len(t) for t in tails])
    ids = torch.full((len(tails), int(lengths.max())), pad_id)
    for row, tail in zip(ids, tails, strict=True):
        row[: len(tail)] = torch.from_numpy(tail.astype(np.int64))
    places = torch.arange(ids.shape[1])
    seen = torch.ones(len(tails), head.length, dtype=torch.long)
    cache = copy.deepcopy(head.cache)
    cache.batch_repeat_interleave(len(tails))
    out = causal.base_model(
        input_ids=ids.to(causal.device),
        attention_mask=torch.cat([seen, (places < lengths[:, None]).long()], dim=1).to(causal.device),
        position_ids=(head.length + places).expand_as(ids).to(causal.device),
        past_key_values=cache,
        use_cache=True,
    )
    last = out.last_hidden_state[torch.arange(len(tails)), lengths - 1]
    return _project(causal, last, candidates).float().cpu()


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper (its layers keep their adapters)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def _project(causal: PreTrainedModel, hidden: torch.Tensor, candidates: Sequence[int]) -> torch.Tensor:
    """Candidate logits of ``hidden [rows, width]``; a head that carries an adapter is applied as a whole.

    The architecture's own soft-capping follows (Gemma 2, arXiv 2408.00118 §2: ``cap · tanh(logits / cap)``).
    """
    lm_head: nn.Module = causal.get_output_embeddings()
    if isinstance(lm_head, nn.Linear):
        rows = lm_head.weight[list(candidates)].float()
        bias = None if lm_head.bias is None else lm_head.bias[list(candidates)].float()
        logits = nn.functional.linear(hidden.float(), rows, bias)
    else:
        logits = lm_head(hidden)[:, list(candidates)]
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
