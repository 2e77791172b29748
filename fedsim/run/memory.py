"""Memory that each stage needs, from sizes, and memory that is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import psutil
import torch

from fedsim.attention.kv_cache import GROWTH, LAYERS
from fedsim.generate.decode import PREFILL_TOKENS
from fedsim.model.logprobs import MAX_LOGITS
from fedsim.model.shape import ModelShape


@dataclass(frozen=True)
class Need:
    """Memory of one stage on one rank.

    Attributes:
        stage: what is done.
        num_bytes: upper bound, as if every row had the largest allowed length.
        key: the configuration key to lower where it does not fit.
    """

    stage: str
    num_bytes: int
    key: str


def training_need(
    shape: ModelShape,
    stage: str,
    key: str,
    *,
    num_tokens: int,
    row_tokens: int,
    num_vectors: int,
    beside: int = 0,
) -> Need:
    """Memory of training steps.

    ``beside`` + weights + ``num_vectors`` fp32 vectors of the adapter's size + what a backward pass
    keeps (:func:`kept_by_a_token`), with one more layer for the gradients of the one that it is in,
    and four rows of logits (the head's own, and in fp32 their logarithms of probabilities, their
    gradient and the head's) of as many tokens as go through the head at once.

    Args:
        num_tokens: of a pass.
        row_tokens: of its longest row.
        beside: bytes of other models that are in memory at the time.
    """
    # Activations of all layers, and the gradients of the layer that the backward pass is in.
    layers = 1 + 1 / max(1, shape.num_layers)
    kept = math.ceil(num_tokens * kept_by_a_token(shape, row_tokens) * layers)

    # Logits [tokens, vocabulary]: three times in fp32, once in the base's dtype.
    num_logits = min(num_tokens * shape.vocab_size, max(MAX_LOGITS, shape.vocab_size))
    logits = num_logits * (3 * 4 + shape.dtype.itemsize)

    # fp32 vectors of the adapter's size.
    vectors = 4 * num_vectors * shape.adapter_size
    return Need(stage, beside + shape.weight_bytes + vectors + kept + logits, key)


def kept_by_a_token(shape: ModelShape, row_tokens: int) -> int:
    """Bytes that a backward pass keeps for one token, over all layers.

    They are 5.9 MB at 8B in bf16 with LoRA on q and v. In the base's dtype three rows of the
    feed-forward part, and queries, keys, values and what attention gives, twice where the backend
    pads rows to almost double their length. In fp32 what goes into norms, and PEFT's copy of what
    goes into each LoRA layer, with a byte for what dropout keeps of it. Eager attention keeps its
    weights, in fp32 and in the base's dtype, capped scores, and keys and values repeated for each
    query head.

    Args:
        row_tokens: of the longest row.
    """
    size = shape.dtype.itemsize  # bytes
    pads = 1
    if shape.attention.name in ("sdpa", "eager"):
        pads = 2  # rows are padded to the longest of a pass

    # Queries, keys, values and attention's output; eager attention also keeps its weights.
    attention = (2 * shape.query_size + shape.kv_size) * size * pads
    if shape.attention.name == "eager":
        scores = shape.num_heads * row_tokens * (4 + 4 + size % 4)
        attention = pads * (4 * shape.query_size * size + scores)

    # The feed-forward part's three rows, norms' inputs in fp32, LoRA's inputs and dropout masks.
    layers = shape.num_layers * (attention + 3 * shape.intermediate_size * size)
    return layers + 4 * shape.norm_size + (4 + 1) * shape.lora_size


def generation_need(
    shape: ModelShape,
    stage: str,
    key: str,
    *,
    num_rows: int,
    num_tokens: int,
    beside: int = 0,
) -> Need:
    """Memory of decoding: weights, KV cache, one prefill pass, one row of logits for each row.

    While the slots of some layers grow, their old ones are still there.

    Args:
        num_rows: that are decoded together.
        num_tokens: context of each row, over all turns that are kept.
        beside: bytes of vectors, and of other models that are in memory at the time.
    """
    # Slots of the KV cache: [rows, capacity] in every layer, and old ones of growing layers.
    capacity = -(-num_tokens // GROWTH) * GROWTH
    layers = shape.num_layers + min(LAYERS, shape.num_layers)
    cache = num_rows * capacity * layers * shape.kv_size * shape.dtype.itemsize

    # Activations of the tokens that one prefill pass reads.
    read = min(num_rows * num_tokens, max(num_tokens, PREFILL_TOKENS))
    prefill = read * (2 * shape.hidden_size + 3 * shape.intermediate_size) * shape.dtype.itemsize

    # Sampling works in fp64 [rows, vocabulary]: logits, exponentials, cumulative sum.
    logits = 3 * 8 * num_rows * shape.vocab_size
    return Need(stage, beside + shape.weight_bytes + cache + prefill + logits, key)


def scoring_need(
    shape: ModelShape,
    stage: str,
    key: str,
    *,
    num_tokens: int,
    head_tokens: int,
    tail_tokens: int,
    beside: int = 0,
) -> Need:
    """Memory of scoring packed tails behind a common head.

    The head's keys and values are kept in every layer. Attention copies the head before each tail,
    once packed and once padded, of one layer at a time.

    Args:
        num_tokens: of all tails of a unit.
        head_tokens: of the head, at most.
        tail_tokens: of a tail, at least.
        beside: bytes of vectors, and of other models that are in memory at the time.
    """
    kept = head_tokens * shape.num_layers * shape.kv_size
    copies = 2 * (num_tokens + -(-num_tokens // tail_tokens) * head_tokens) * shape.kv_size
    layer = num_tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    return Need(
        stage,
        beside + shape.weight_bytes + (kept + copies + layer) * shape.dtype.itemsize,
        key,
    )


PASS_SHARE: Final = 0.8
"""Share of a GPU that training passes may be planned to fill; fragments and CUDA take the rest."""


def usable_memory(device: torch.device, sharing: int) -> int:
    """Bytes that training passes of one of ``sharing`` processes on a GPU may take; 0 on the CPU.

    A share of the whole GPU, so that it does not change from run to run, unless others hold so much
    that less is free. The machine's RAM is not divided up so: on the CPU larger passes are not
    faster.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return min(int(free), int(PASS_SHARE * total)) // sharing


def free_memory(device: torch.device, sharing: int) -> int:
    """Free bytes for one of ``sharing`` processes: of its GPU, or on the CPU of the RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // sharing
    return int(psutil.virtual_memory().available) // sharing
