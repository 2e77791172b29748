"""Cost of a piece of work, floating-point operations and bytes of memory traffic, from the shapes.

Counted is what the algorithm needs, not what a kernel does: real tokens and not padding, each weight once a pass. Of a
matrix product with N parameters, a token costs 2N forward; LoRA training adds 2N for the gradient of the activations
and none for the frozen weight, so 4N, and 6N for the LoRA matrices themselves. Attention adds two products of queries
with the context, 4·L·d a pair of positions forward and twice that backward (12·L·d; L layers of width d = heads ·
head size; the whole square is counted though half of it is masked, as is usual for MFU: PaLM, arXiv 2204.02311,
appendix B). Left out: element-wise work, and that the first layer passes no gradient on to the embeddings. Dense
models only; no gradient checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fedsim.attention.forward import text_names
from fedsim.attention.self_test import head_sizes, num_key_heads
from fedsim.data.chat import TokenRow


@dataclass(frozen=True)
class Work:
    """Sizes of some forward passes, summed over rows.

    Attributes:
        tokens: tokens put through the layers.
        targets: positions put through the LM head.
        pairs: pairs of a query and a position that it may attend to.
        passes: times that the weights are read: micro-batches, or steps of decoding.
        cached: positions read from a KV cache.
    """

    tokens: int = 0
    targets: int = 0
    pairs: int = 0
    passes: int = 0
    cached: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.targets + other.targets,
            self.pairs + other.pairs,
            self.passes + other.passes,
            self.cached + other.cached,
        )


def rows_work(rows: Iterable[TokenRow], passes: int) -> Work:
    """Rows that are scored or trained on; a row's last token is only a target."""
    lengths = [(max(len(row) - 1, 1), row.num_targets) for row in rows]
    return Work(
        tokens=sum(length for length, _ in lengths),
        targets=sum(targets for _, targets in lengths),
        pairs=sum(length * length for length, _ in lengths),
        passes=passes,
    )


def decode_work(turns: Iterable[tuple[int, int, int]], passes: int) -> Work:
    """Generation: turns of ``(kept, prompt tokens, new tokens)``.

    ``kept`` of the prompt's tokens stood in the KV cache; a turn's last new token is not put through the layers.
    """
    work = Work(passes=passes)
    for kept, prompt, new in turns:
        read, later = prompt - kept, max(new - 1, 0)
        context = later * prompt + later * (later + 1) // 2
        work += Work(tokens=read + later, targets=new, pairs=read * prompt + context, cached=kept + context)
    return work


@dataclass(frozen=True)
class Effort:
    """FLOPs and bytes that some work needs at least, and its tokens."""

    flops: float = 0.0
    num_bytes: float = 0.0
    tokens: int = 0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.flops + other.flops, self.num_bytes + other.num_bytes, self.tokens + other.tokens)


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model.

    Attributes:
        body: parameters of the layers' matrix products.
        lora: of the LoRA matrices.
        head: of the LM head.
        attention: L·d.
        weight_bytes: bytes of all of them.
        cache_bytes: of one position in the KV cache.
    """

    body: int
    lora: int
    head: int
    attention: int
    weight_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelCost:
        """Measure a causal LM that has LoRA layers inside."""
        head = model.get_output_embeddings()
        counts = {"body": 0, "lora": 0, "head": 0}
        weight_bytes = 0
        text = text_names(model)  # the towers of a multimodal model compute nothing
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and re.fullmatch(text, name):
                part = "head" if module is head else "lora" if "lora_" in name else "body"
                counts[part] += module.weight.numel()
                weight_bytes += module.weight.numel() * module.weight.element_size()
        config = model.config.get_text_config()
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        key_size, value_size = head_sizes(config)
        num_cached = layers * num_key_heads(config) * (key_size + value_size)
        size = next(model.parameters()).element_size()
        return cls(**counts, attention=layers * heads * (key_size + value_size) // 2, weight_bytes=weight_bytes,
                   cache_bytes=num_cached * size)  # fmt: skip

    def forward(self, work: Work) -> Effort:
        """Scoring or generation."""
        flops = (
            2 * (self.body + self.lora) * work.tokens + 2 * self.head * work.targets + 4 * self.attention * work.pairs
        )
        return Effort(flops, work.passes * self.weight_bytes + work.cached * self.cache_bytes, work.tokens)

    def train(self, work: Work) -> Effort:
        """Forward and backward passes of LoRA training."""
        flops = (
            (4 * self.body + 6 * self.lora) * work.tokens
            + 4 * self.head * work.targets
            + 12 * self.attention * work.pairs
        )
        return Effort(flops, 2 * work.passes * self.weight_bytes, work.tokens)
