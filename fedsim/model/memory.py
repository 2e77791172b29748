"""How much memory each stage needs, from sizes alone, and how much there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

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
    """Memory of decoding or prefix scoring: weights, keys and values of every token, and one row of logits a row.

    Args:
        num_rows: of a unit.
        num_tokens: context of each row.
        beside: bytes of vectors, and of other models that are in memory at the time.
    """
    cache = num_rows * num_tokens * shape.num_layers * shape.kv_size * shape.dtype.itemsize
    prefill = num_rows * num_tokens * (2 * shape.hidden_size + 3 * shape.intermediate_size) * shape.dtype.itemsize
    logits = 3 * 8 * num_rows * shape.vocab_size  # sampling works in fp64: logits, softmax, cumulative sum
    return Need(stage, beside + shape.weight_bytes + cache + prefill + logits, key)


def free_memory(device: torch.device, num_ranks: int) -> int:
    """Bytes that one of ``num_ranks`` processes on this machine can have: of its GPU, or its share of the free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // math.ceil(num_ranks / torch.cuda.device_count())
    return int(psutil.virtual_memory().available) // num_ranks
