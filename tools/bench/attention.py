"""Attention alone: every backend against the definition, and packed rows against padded, masked ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fedsim.attention.backends import BACKENDS, Scores
from fedsim.attention.choice import problem
from fedsim.attention.self_test import LIMITS, WIDE_LIMIT, Heads, distances
from fedsim.attention.spans import Spans
from fedsim.study.bench_rows import Correctness, Row
from tools.bench.lengths import draw
from tools.bench.measure import percentiles, take_turns
from tools.bench.models import build
from tools.bench.stage import Bench

WINDOW = 16


def heads_of(bench: Bench) -> Heads:
    """The benchmark model's, with a window."""
    config = bench.size.config
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    return Heads(heads, config["num_key_value_heads"], size, size, window=WINDOW)


class AttentionStage:
    """See the module."""

    name = "attention"

    def check(self, bench: Bench) -> list[Correctness]:
        """Odd lengths, queries behind a prefix, windows, a step of decoding; values and gradients."""
        return [check for name in available(bench) for check in checks_of(name, bench)]

    def time(self, bench: Bench) -> list[Row]:
        """A layer's forward and backward pass over 16 rows of SQuARe's lengths, beside the same rows padded."""
        heads = heads_of(bench)
        lengths = [p + r for p, r in zip(draw("prompt", 16, 55.0), draw("reply", 16, 55.0), strict=True)]
        names = [name for name in available(bench) if name not in bench.wrong]
        calls: dict[str, Callable[[], Any]] = {name: packed_call(name, lengths, heads, bench) for name in names}
        peer = "padded to the longest, with a mask (sdpa)"
        found = take_turns({**calls, peer: padded_call(lengths, heads, bench)}, bench.device, repeats=bench.repeats)
        shapes = {
            "rows": 16,
            "tokens": sum(lengths),
            "longest": max(lengths),
            "queries": heads.queries,
            "keys": heads.keys,
            "size": heads.size,
        }
        return [
            Row(
                self.name,
                f"{name}, one layer, forward and backward",
                bench.dtype_name,
                shapes,
                percentiles(found[name]),
                len(found[name]),
                peer=peer,
                peer_seconds=percentiles(found[peer]),
            )
            for name in names
        ]


STAGE = AttentionStage()


def available(bench: Bench) -> list[str]:
    """Backends that can be had here for the benchmark's model."""
    config = build(bench.size, bench.dtype, torch.device("meta")).config
    return [name for name in BACKENDS if problem(name, config, bench.dtype, bench.device) is None]


def checks_of(name: str, bench: Bench) -> list[Correctness]:
    """One backend's cases; one that breaks off fails, alone."""
    limit = LIMITS.get(bench.dtype, WIDE_LIMIT)
    try:
        found = list(distances(BACKENDS[name], heads_of(bench), bench.dtype, bench.device))
    except RuntimeError as error:
        found = [(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", "nothing", math.nan)]
    return [
        Correctness(f"{name}: {what}: {tensor} against the definition, ‖Δ‖ / ‖definition‖", error, limit, part=name)
        for what, tensor, error in found
    ]


def packed_call(name: str, lengths: list[int], heads: Heads, bench: Bench) -> Callable[[], None]:
    """Forward and backward pass over packed rows."""
    spans = Spans(lengths, device=bench.device)
    inputs = [
        torch.randn(sum(lengths), count, heads.size, device=bench.device, dtype=bench.dtype, requires_grad=True)
        for count in (heads.queries, heads.keys, heads.keys)
    ]
    scores = Scores(heads.size**-0.5)

    def call() -> None:
        BACKENDS[name].spans(inputs[0], inputs[1], inputs[2], spans, scores).sum().backward()

    return call


def padded_call(lengths: list[int], heads: Heads, bench: Bench) -> Callable[[], None]:
    """The same rows padded on the right, with the mask that transformers makes of an attention mask."""
    rows, longest = len(lengths), max(lengths)
    inputs = [
        torch.randn(rows, count, longest, heads.size, device=bench.device, dtype=bench.dtype, requires_grad=True)
        for count in (heads.queries, heads.keys, heads.keys)
    ]
    places = torch.arange(longest, device=bench.device)
    real = places < torch.tensor(lengths, device=bench.device)[:, None]
    mask = (places[:, None] >= places) & real[:, None, None]

    def call() -> None:
        shared = heads.queries // heads.keys
        key, value = (part.repeat_interleave(shared, dim=1) for part in inputs[1:])
        F.scaled_dot_product_attention(inputs[0], key, value, attn_mask=mask).sum().backward()

    return call
