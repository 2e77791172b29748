"""Attention alone: every backend against the definition in fp64, and packed rows against padded, masked ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fedsim.attention.backends import BACKENDS, Backend, Cached, Eager, Scores
from fedsim.attention.choice import CUDA_ONLY, problem
from fedsim.attention.spans import Spans
from tools.bench.lengths import draw
from tools.bench.measure import percentiles, take_turns
from tools.bench.models import build
from tools.bench.rows import Correctness, Row
from tools.bench.stage import Bench

ODD = (1, 2, 3, 17, 64, 127, 130)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # bf16 keeps 8 bits: half a unit in the last place is 2e-3


@dataclass(frozen=True)
class Heads:
    """Shape of a layer's attention."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, bench: Bench) -> Heads:
        """The benchmark model's."""
        config = bench.size.config
        heads = config["num_attention_heads"]
        return cls(heads, config["num_key_value_heads"], config["hidden_size"] // heads)


class AttentionStage:
    """See the module."""

    name = "attention"

    def check(self, bench: Bench) -> list[Correctness]:
        """Odd lengths, queries behind a prefix, windows, a step of decoding; values and gradients."""
        return [check for name in available(bench) for check in checks_of(name, bench)]

    def time(self, bench: Bench) -> list[Row]:
        """A layer's forward and backward pass over 16 rows of SQuARe's lengths, beside the same rows padded."""
        heads = Heads.of(bench)
        lengths = [p + r for p, r in zip(draw("prompt", 16, 55.0), draw("reply", 16, 55.0), strict=True)]
        names = [name for name in available(bench) if name not in bench.wrong]
        calls: dict[str, Callable[[], Any]] = {name: packed_call(name, lengths, heads, bench) for name in names}
        peer = "padded to the longest, with a mask (sdpa)"
        found = take_turns({**calls, peer: padded_call(lengths, heads, bench)}, bench.device, repeats=bench.repeats)
        shapes = {"rows": 16, "tokens": sum(lengths), "longest": max(lengths), **vars(heads)}
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
    try:
        found = distances(BACKENDS[name], Heads.of(bench), bench.dtype, bench.device)
    except RuntimeError as error:
        found = {f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}": math.nan}
    return [
        Correctness(
            f"{name}: {what}; values and gradients against the definition in fp64, ‖Δ‖ / ‖definition‖",
            error,
            LIMITS[bench.dtype],
            proves=name if name in CUDA_ONLY else "",
            part=name,
        )
        for what, error in found.items()
    ]


def distances(backend: Backend, heads: Heads, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative distance from the definition in fp64, by case."""
    scores = Scores(heads.size**-0.5)
    plain = Spans(ODD, device=device)
    behind = Spans(ODD, [length + 33 for length in ODD], device=device)
    found: dict[str, float] = {}
    for what, spans, used in (
        ("rows of odd lengths", plain, scores),
        ("a window of 16", plain, Scores(scores.scale, window=16)),
        ("queries behind a prefix", behind, scores),
    ):
        found[what] = _spans_distance(backend, heads, spans, used, dtype)
    return found | {"a step of decoding": _slots_distance(backend, heads, scores, dtype, device)}


def _spans_distance(backend: Backend, heads: Heads, spans: Spans, scores: Scores, dtype: torch.dtype) -> float:
    """The largest over values and the gradients of queries, keys and values."""
    generator = torch.Generator(spans.device).manual_seed(0)
    sizes = [(spans.num_queries, heads.queries), *[(sum(spans.key_lengths), heads.keys)] * 2]
    drawn = [torch.randn(*size, heads.size, generator=generator, device=spans.device).to(dtype) for size in sizes]
    weight = torch.randn(spans.num_queries, heads.queries, heads.size, generator=generator, device=spans.device)
    results = []
    for which, kind in ((backend, dtype), (Eager(), torch.float64)):
        inputs = [part.to(kind, copy=True).requires_grad_() for part in drawn]
        out = which.spans(inputs[0], inputs[1], inputs[2], spans, scores)
        (out * weight.to(kind)).sum().backward()
        results.append([out, *(part.grad for part in inputs)])
    found = [relative(mine, true) for mine, true in zip(*results, strict=True)]
    return float(torch.tensor(found, dtype=torch.float64).max())  # Python's max may lose a NaN, torch's does not


def _slots_distance(backend: Backend, heads: Heads, scores: Scores, dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(1)
    rows, capacity = len(ODD), 256
    query = torch.randn(rows, heads.queries, heads.size, generator=generator, device=device).to(dtype)
    keys, values = (
        torch.randn(rows, capacity, heads.keys, heads.size, generator=generator, device=device).to(dtype)
        for _ in range(2)
    )
    lengths = torch.tensor(ODD, dtype=torch.int32, device=device)
    mine = backend.slots(query, Cached(keys, values, lengths, max(ODD)), scores)
    return relative(
        mine, Eager().slots(query.double(), Cached(keys.double(), values.double(), lengths, max(ODD)), scores)
    )


def relative(mine: torch.Tensor | None, true: torch.Tensor | None) -> float:
    """‖mine − true‖ / ‖true‖."""
    assert mine is not None and true is not None
    mine, true = mine.detach().double(), true.detach().double()
    return float((mine - true).norm() / true.norm())


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
