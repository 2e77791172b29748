"""Cost of a piece of work, floating-point operations and bytes of memory traffic, from the shapes.

Counted is what the algorithm needs, not what a kernel does: real tokens and not padding, each
weight once a pass. Of a matrix product with N parameters, a token costs 2N forward; LoRA training
adds 2N for the gradient of the activations and none for the frozen weight, so 4N, and 6N for the
LoRA matrices themselves. Attention adds two products of queries with the context, 4·L·d a pair of
positions forward and twice that backward (12·L·d; L layers of width d = heads · head size; the
whole square is counted though half of it is masked, as is usual for MFU: PaLM, arXiv 2204.02311,
appendix B). Left out: element-wise work, and that the first layer passes no gradient on to the
embeddings. Dense models only; no gradient checkpointing.
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
    """Work of scoring rows or training on them; a row's last token is only a target."""
    tokens = targets = pairs = 0
    for row in rows:
        length = max(len(row) - 1, 1)
        tokens += length
        targets += row.num_targets
        pairs += length * length
    return Work(tokens=tokens, targets=targets, pairs=pairs, passes=passes)


def decode_work(turns: Iterable[tuple[int, int, int]], passes: int) -> Work:
    """Work of generation.

    Args:
        turns: ``(kept, prompt tokens, new tokens)`` of each turn. ``kept`` of the prompt's tokens
            were in the KV cache; a turn's last new token is not put through the layers.
        passes: steps of decoding.
    """
    work = Work(passes=passes)
    for kept, prompt, new in turns:
        read, later = prompt - kept, max(new - 1, 0)
        # Step i of the later ones sees the prompt and i new tokens.
        context = later * prompt + later * (later + 1) // 2
        pairs = read * prompt + context
        work += Work(tokens=read + later, targets=new, pairs=pairs, cached=kept + context)
    return work


@dataclass(frozen=True)
class Effort:
    """FLOPs and bytes that some work needs at least, and its tokens."""

    flops: float = 0.0
    num_bytes: float = 0.0
    tokens: int = 0

    def __add__(self, other: Effort) -> Effort:
        flops, num_bytes = self.flops + other.flops, self.num_bytes + other.num_bytes
        return Effort(flops, num_bytes, self.tokens + other.tokens)


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
        # Parameters of the linear layers; the towers of a multimodal model compute nothing.
        head = model.get_output_embeddings()
        text = text_names(model)
        counts = {"body": 0, "lora": 0, "head": 0}
        weight_bytes = 0
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or not re.fullmatch(text, name):
                continue
            if module is head:
                part = "head"
            elif "lora_" in name:
                part = "lora"
            else:
                part = "body"
            counts[part] += module.weight.numel()
            weight_bytes += module.weight.numel() * module.weight.element_size()

        # Attention: L layers of width d, the mean of the keys' and the values' width.
        config = model.config.get_text_config()
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        key_size, value_size = head_sizes(config)
        attention = layers * heads * (key_size + value_size) // 2

        # KV cache: numbers of one position, over all layers.
        num_cached = layers * num_key_heads(config) * (key_size + value_size)
        cache_bytes = num_cached * next(model.parameters()).element_size()
        sizes = {"attention": attention, "weight_bytes": weight_bytes, "cache_bytes": cache_bytes}
        return cls(**counts, **sizes)

    def forward(self, work: Work) -> Effort:
        """Compute the effort of scoring or generation."""
        flops = 2 * (self.body + self.lora) * work.tokens
        flops += 2 * self.head * work.targets
        flops += 4 * self.attention * work.pairs
        num_bytes = work.passes * self.weight_bytes + work.cached * self.cache_bytes
        return Effort(flops, num_bytes, work.tokens)

    def train(self, work: Work) -> Effort:
        """Compute the effort of forward and backward passes of LoRA training."""
        flops = (4 * self.body + 6 * self.lora) * work.tokens
        flops += 4 * self.head * work.targets
        flops += 12 * self.attention * work.pairs
        return Effort(flops, 2 * work.passes * self.weight_bytes, work.tokens)
