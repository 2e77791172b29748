"""Fused functions: values and gradients of the plain modules, exactly differentiated, and little that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fedsim.fused import functions, ops
from fedsim.train.dropout import Counted, Masked

EPS = 1e-5
sizes = st.integers(1, 9)
seeds = st.integers(0, 1000)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Values of a function, and gradients of their product with fixed numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    fixed = [numbers(99 + i, *out.shape, dtype=out.dtype) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(list(outs), leaves, fixed)]


def compare(fused: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Against the plain function in the same type, and in bf16 also against it in fp64: rounding, and no more."""
    dtype = inputs[0].dtype
    for found, wanted in zip(results(fused, inputs), results(plain, inputs), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert distance(found, wanted) <= LIMITS[dtype]
    exact = results(plain, [x.double() for x in inputs])
    for found, wanted in zip(results(fused, inputs), exact, strict=True):
        assert distance(found, wanted) <= LIMITS[dtype]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the wanted numbers; where these are small by cancellation, to a quarter of the inputs' order, 1."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(0.25))


def plain_norm(weight: Tensor) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:  # Llama's is in fp32 whatever comes
        if x.dtype == torch.float64:
            return weight.double() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
        module = LlamaRMSNorm(len(weight), EPS).to(x.dtype)
        module.weight = torch.nn.Parameter(weight.to(x.dtype), requires_grad=False)
        out: Tensor = module(x)
        return out

    return norm


@given(rows=sizes, width=st.integers(2, 40), dtype=dtypes, seed=seeds)
@settings(deadline=None, max_examples=60)
def test_norm(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    weight, x, delta = numbers(seed, width), numbers(seed + 1, 1, rows, width), numbers(seed + 2, 1, rows, width)
    x, delta, weight = x.to(dtype), delta.to(dtype), weight.to(dtype)
    plain = plain_norm(weight)
    compare(lambda x: functions.norm(x, weight.to(x.dtype), EPS), plain, [x])
    compare(lambda x: functions.add_norm(x, None, weight.to(x.dtype), EPS), lambda x: (x + 0, plain(x)), [x])

    def both(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, plain(x + delta)

    compare(lambda x, delta: functions.add_norm(x, delta, weight.to(x.dtype), EPS), both, [x, delta])


@given(rows=sizes, width=sizes, inner=sizes, dtype=dtypes, seed=seeds, adds=st.booleans())
@settings(deadline=None, max_examples=60)
def test_feed(rows: int, width: int, inner: int, dtype: torch.dtype, seed: int, adds: bool) -> None:
    gate, up, down = numbers(seed, inner, width), numbers(seed + 1, inner, width), numbers(seed + 2, width, inner)
    inputs = [numbers(seed + 3, 1, rows, width).to(dtype), numbers(seed + 4, 1, rows, width).to(dtype)][: 1 + adds]

    def fused(x: Tensor, added: Tensor | None = None) -> Tensor:
        return functions.feed_forward(x, *(w.to(x.dtype) for w in (gate, up, down)), added)

    def plain(x: Tensor, added: Tensor | None = None) -> Tensor:
        g, u, d = (w.to(dtype).to(x.dtype) for w in (gate, up, down))
        out = F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)
        return out if added is None else added + out

    compare(fused, plain, inputs)
    product = [numbers(seed + 5, rows, inner).to(dtype), numbers(seed + 6, rows, inner).to(dtype)]
    compare(functions.silu_mul, lambda g, u: F.silu(g) * u, product)


@given(batch=st.integers(1, 3), length=sizes, heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), half=sizes,
       dtype=dtypes, seed=seeds)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_rotate(batch: int, length: int, heads: tuple[int, int], half: int, dtype: torch.dtype, seed: int) -> None:
    """Cosines and sines of both halves are independent numbers, so that each gradient takes its own."""
    inputs = [numbers(seed + i, batch, length, n, 2 * half).to(dtype).transpose(1, 2) for i, n in enumerate(heads)]
    cos, sin = (numbers(seed + i, 1, length, 2 * half).to(dtype) for i in (2, 3))
    compare(
        lambda q, k: functions.rotate(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        lambda q, k: apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        inputs,
    )


def draw_of(kind: str, tokens: int, width: int, seed: int, p: float) -> functions.DropoutMask | None:
    if kind == "none":
        return None
    if kind == "masked":
        return Masked(numbers(seed, tokens, width) > 0, p)
    return Counted(torch.stack([torch.full((tokens,), seed), torch.arange(tokens)]), 3, p)


@given(rows=sizes, width=sizes, out=sizes, rank=st.integers(1, 4), dtype=dtypes, master=st.booleans(),
       kind=st.sampled_from(["none", "masked", "counted"]), bias=st.booleans(), seed=seeds)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_lora(
    rows: int, width: int, out: int, rank: int, dtype: torch.dtype, master: bool, kind: str, bias: bool, seed: int
) -> None:
    """Beside PEFT's order of operators; the low-rank matrices in fp32 or in the base's type."""
    weight, beside = numbers(seed, out, width).to(dtype), numbers(seed + 1, out).to(dtype) if bias else None
    own = torch.float32 if master and dtype == torch.bfloat16 else dtype
    x = numbers(seed + 2, 1, rows, width).to(dtype)
    a, b = numbers(seed + 3, rank, width).to(own), numbers(seed + 4, out, rank).to(own)
    draw = draw_of(kind, rows, width, seed, 0.25)

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        added = None if beside is None else beside.to(x.dtype)
        return functions.lora(x, weight.to(x.dtype), added, a, b, 1.7, draw)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        base = F.linear(x, weight.to(x.dtype), None if beside is None else beside.to(x.dtype))
        kept = x.to(a.dtype)
        if draw is not None:
            kept = kept * draw.apply(torch.ones(rows, width, dtype=torch.float64)).to(a.dtype)
        return (base + F.linear(F.linear(kept, a), b) * 1.7).to(base.dtype)

    found, wanted = results(fused, [x, a, b]), results(plain, [x, a, b])
    exact = results(plain, [x.double(), a.double(), b.double()])
    # The value may cancel: rounding is relative to its terms. Gradients are sums of few products here.
    size = float(exact[0].norm()) + 10 * float(weight.double().norm() * x.double().norm()) * (dtype == torch.bfloat16)
    assert float((found[0].double() - exact[0]).norm()) <= LIMITS[dtype] * size
    for got, want, right in zip(found[1:], wanted[1:], exact[1:], strict=True):
        assert got.dtype == want.dtype and distance(got, right) <= 2 * LIMITS[dtype] + 2 * distance(want, right)


@given(rows=sizes, width=st.integers(2, 30), dtype=dtypes, seed=seeds)
@settings(deadline=None, max_examples=40)
def test_pick(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    ids = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(seed))

    def plain(logits: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return -F.nll_loss(F.log_softmax(logits, dim=-1, dtype=wide), ids, reduction="none")

    compare(lambda logits: functions.pick(logits, ids), plain, [4 * numbers(seed, rows, width).to(dtype)])


def test_gradients_are_the_functions_own() -> None:
    """Finite differences in fp64 of every function, with every argument that has a gradient."""

    def check(function: Callable[..., Any], *inputs: Tensor) -> None:
        assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])

    w5, x, d = numbers(1, 5), numbers(2, 3, 5), numbers(3, 3, 5)
    check(lambda x: functions.norm(x, w5, EPS), x)
    check(lambda x, d: functions.add_norm(x, d, w5, EPS), x, d)
    check(functions.silu_mul, x, d)
    weights = numbers(4, 7, 5), numbers(5, 7, 5), numbers(6, 5, 7)
    check(lambda x, d: functions.feed_forward(x, *weights, d), x, d)
    q, k = numbers(7, 2, 4, 3, 6), numbers(8, 2, 2, 3, 6)
    check(lambda q, k: functions.rotate(q, k, numbers(9, 1, 3, 6), numbers(10, 1, 3, 6)), q, k)
    for kind in ("none", "masked", "counted"):
        draw = draw_of(kind, 3, 5, 1, 0.25)
        a, b = numbers(12, 2, 5), numbers(13, 4, 2)
        check(lambda x, a, b, draw=draw: functions.lora(x, numbers(11, 4, 5), None, a, b, 1.7, draw), x, a, b)
    check(lambda logits: functions.pick(logits, torch.tensor([0, 4, 2])), x)


def kept_bytes(act: Callable[[], Tensor], *free: Tensor) -> int:
    """Bytes of storage that a backward pass keeps beside ``free``."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        act()
    return sum(n for place, n in seen.items() if place not in {x.untyped_storage().data_ptr() for x in free})


def test_little_is_kept() -> None:
    """In bytes: a norm one number a row; LoRA its rank; feed-forward two products; rotations nothing of the heads."""
    rows, width, inner, rank = 64, 32, 80, 2
    x = numbers(0, rows, width, dtype=torch.bfloat16).requires_grad_()
    w = torch.ones(width, dtype=torch.bfloat16)
    assert kept_bytes(lambda: functions.norm(x, w, EPS), x, w) == 4 * rows
    base = numbers(1, width, width, dtype=torch.bfloat16)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((rank, width), (width, rank)))
    draw = draw_of("counted", rows, width, 1, 0.1)
    assert kept_bytes(lambda: functions.lora(x, base, None, a, b, 2.0, draw), x, base) == 2 * rank * (rows + 2 * width)
    shapes = [(inner, width), (inner, width), (width, inner)]
    weights = [numbers(i, *shape, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
    assert kept_bytes(lambda: functions.feed_forward(x, *weights), *weights) == 2 * 2 * rows * inner
    q, k = (numbers(i, 1, 2, rows, 8, dtype=torch.bfloat16).requires_grad_() for i in (1, 2))
    cos, sin = (numbers(i, 1, rows, 8, dtype=torch.bfloat16) for i in (3, 4))
    assert kept_bytes(lambda: functions.rotate(q, k, cos, sin)[0], cos, sin) == 0
    logits = numbers(5, rows, 100, dtype=torch.bfloat16).requires_grad_()
    ids = torch.zeros(rows, dtype=torch.int64)
    assert kept_bytes(lambda: functions.pick(logits, ids), logits, ids) == 4 * rows


# Known answers of Philox4x32-10 in the Random123 distribution (kat_vectors): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    whole = key[0] | key[1] << 32
    signed = torch.tensor([whole - (1 << 64) if whole >= 1 << 63 else whole])
    found = ops.philox(signed, tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in found) == words


def test_operators_know_their_shapes() -> None:
    """On a fake device each gives what it gives on the CPU: types, shapes and strides."""
    x, w, ids = torch.randn(6, 8), torch.ones(8), torch.zeros(6, dtype=torch.int64)
    q, k, cos = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 8)
    lse = torch.zeros(6)
    for name, args in {
        "norm": (x, None, w, EPS), "norm_grad": (x, x, w, lse, None), "silu_mul": (x, x), "silu_mul_grad": (x, x, x),
        "rotate": (q, k, cos, cos, True), "drop": (x, ids, ids, 1, 0.5, None), "pick": (x, ids),
        "pick_grad": (lse, x, ids, lse),
    }.items():  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            cast = tuple(
                a.to(dtype) if isinstance(a, Tensor) and a.dtype == torch.float32 and a is not lse else a for a in args
            )
            torch.library.opcheck(getattr(ops.OPS, name).default, cast, test_utils=("test_schema", "test_faketensor"))


def test_tensors_on_two_devices_are_an_error() -> None:
    x, ids = torch.empty(3, 4, device="meta"), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="fedsim::drop: tensors on cpu and meta"):
        ops.OPS.drop(x, ids, ids, 1, 0.5, None)
