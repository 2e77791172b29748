"""How much memory each stage needs, from sizes alone, and how much there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from fedsim.generate.decode import PREFILL_TOKENS
from fedsim.generate.slots import GROWTH
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
    shape: ModelShape, stage: str, key: str, *, num_tokens: int, num_vectors: int, beside: int = 0
) -> Need:
    """Memory of training steps.

    ``beside`` + weights + ``num_vectors`` fp32 vectors of the adapter's size + what a backward pass keeps, per token:
    layers · (4·hidden + 3·intermediate) numbers of the base's dtype, which is 3.8 MB at 8B in bf16, and three rows of
    logits (the head's own, in fp32, and their gradient) of as many tokens as go through the head at once.

    Args:
        num_tokens: of a micro-batch, padded.
        beside: bytes of other models that are in memory at the time.
    """
    kept = shape.num_layers * (4 * shape.hidden_size + 3 * shape.intermediate_size) * shape.dtype.itemsize
    num_logits = min(num_tokens * shape.vocab_size, max(MAX_LOGITS, shape.vocab_size))
    logits = num_logits * (4 + 4 + shape.dtype.itemsize)
    vectors = 4 * num_vectors * shape.adapter_size
    return Need(stage, beside + shape.weight_bytes + vectors + num_tokens * kept + logits, key)


def generation_need(
    shape: ModelShape, stage: str, key: str, *, num_rows: int, num_tokens: int, beside: int = 0
) -> Need:
    """Memory of decoding: weights, the slots of the cache, one pass that reads prompts, and one row of logits a row.

    While a layer's slots grow, its old ones are still there.

    Args:
        num_rows: that are decoded together.
        num_tokens: context of each row, over all turns that are kept.
        beside: bytes of vectors, and of other models that are in memory at the time.
    """
    capacity = -(-num_tokens // GROWTH) * GROWTH
    cache = num_rows * capacity * (shape.num_layers + 1) * shape.kv_size * shape.dtype.itemsize
    read = min(num_rows * num_tokens, max(num_tokens, PREFILL_TOKENS))
    prefill = read * (2 * shape.hidden_size + 3 * shape.intermediate_size) * shape.dtype.itemsize
    logits = 3 * 8 * num_rows * shape.vocab_size  # sampling works in fp64: logits, exponentials, cumulative sum
    return Need(stage, beside + shape.weight_bytes + cache + prefill + logits, key)


def scoring_need(
    shape: ModelShape, stage: str, key: str, *, num_tokens: int, head_tokens: int, tail_tokens: int, beside: int = 0
) -> Need:
    """Memory of scoring packed tails behind a common head, whose keys and values are kept in every layer.

    Attention copies the head before each tail, once packed and once padded, of one layer at a time.

    Args:
        num_tokens: of all tails of a unit.
        head_tokens: of the head, at most.
        tail_tokens: of a tail, at least.
        beside: bytes of vectors, and of other models that are in memory at the time.
    """
    kept = head_tokens * shape.num_layers * shape.kv_size
    copies = 2 * (num_tokens + -(-num_tokens // tail_tokens) * head_tokens) * shape.kv_size
    layer = num_tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    return Need(stage, beside + shape.weight_bytes + (kept + copies + layer) * shape.dtype.itemsize, key)


def free_memory(device: torch.device, num_ranks: int) -> int:
    """Bytes that one of ``num_ranks`` processes on this machine can have: of its GPU, or its share of the free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // math.ceil(num_ranks / torch.cuda.device_count())
    return int(psutil.virtual_memory().available) // num_ranks
