"""The Triton kernels: in the interpreter what the plain operators give; compiled for A100 and H100/H200."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import kernels
from fedsim.fused import ops
from fedsim.kernels import sampling

EPS = 1e-5
# In 16 bits fp16 stands for bf16, which the interpreter cuts off where the hardware rounds to nearest.
DTYPES = [torch.float32, torch.float16]
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3}


def _drop_from_modules() -> dict[str, ModuleType]:
    """Take out Triton's modules and ours, but for compiled ones, which load once."""
    names = [n for n in sys.modules if n.partition(".")[0] == "triton" and not n.startswith("triton._C")]
    return {name: sys.modules.pop(name) for name in [*names, "fedsim.kernels.layers_triton"] if name in sys.modules}


@pytest.fixture(scope="module")
def triton() -> Iterator[ModuleType]:
    """The module with its kernels interpreted: Triton reads the variable where a function is defined, its own too."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        compiled = _drop_from_modules()
        from fedsim.kernels import layers_triton

        yield layers_triton
        _drop_from_modules()
        del kernels.layers_triton
        sys.modules.update(compiled)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> None:
    """Alike up to the order of sums, and one rounding of the result's type at any number."""
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b, limit = a.double(), b.double(), LIMITS[a.dtype]
        largest = float(b.abs().max()) if b.numel() else 0.0
        assert torch.allclose(a, b, rtol=limit, atol=0.1 * limit * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 2, 200), (2, 4096), (2, 5000)])
def test_norm(triton: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, delta, d_out, d_total = (numbers(i, *shape, dtype=dtype) for i in range(4))
    weight = numbers(5, shape[-1], dtype=dtype)
    same(triton.norm(x, None, weight, EPS), ops.norm(x, None, weight, EPS))
    total, _, rstd = wanted = ops.norm(x, delta, weight, EPS)
    same(triton.norm(x, delta, weight, EPS), wanted)
    for also in (None, d_total):
        same(triton.norm_grad(d_out, total, weight, rstd, also), ops.norm_grad(d_out, total, weight, rstd, also))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 30), (2, 1024), (5, 1000)])
def test_silu_mul(triton: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up, d_out = (4 * numbers(i, *shape, dtype=dtype) for i in range(3))
    gate.view(-1)[0] = -200.0  # where exp(200) is infinite
    same(triton.silu_mul(gate, up), ops.silu_mul(gate, up))
    same(triton.silu_mul_grad(d_out, gate, up), ops.silu_mul_grad(d_out, gate, up))
    wanted, both = ops.silu_mul(gate, up), torch.cat([gate.flatten(0, -2), up.flatten(0, -2)], dim=1)
    triton.silu_mul_(*both.chunk(2, dim=1))
    same(both.chunk(2, dim=1)[0], wanted.flatten(0, -2))
    assert torch.equal(both.chunk(2, dim=1)[1], up.flatten(0, -2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tokens", "q_heads", "k_heads", "size"), [(1, 1, 1, 2), (5, 4, 2, 16), (3, 6, 3, 20)])
def test_rotate(
    triton: ModuleType, tokens: int, q_heads: int, k_heads: int, size: int, inverse: bool, dtype: torch.dtype
) -> None:
    """Bits, as both round at the same places; heads that lie before tokens in memory too."""
    cos, sin = numbers(2, tokens, size, dtype=dtype), numbers(3, tokens, size, dtype=dtype)
    q = numbers(0, tokens, q_heads, size, dtype=dtype)
    k = numbers(1, k_heads, tokens, size, dtype=dtype).transpose(0, 1)
    found, wanted = triton.rotate(q, k, cos, sin, inverse), ops.rotate(q, k, cos, sin, inverse)
    if dtype == torch.float16:
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    same(found, wanted)


@pytest.mark.parametrize(("rows", "q_heads", "k_heads", "size"), [(1, 1, 1, 2), (5, 4, 2, 16), (3, 6, 3, 20)])
def test_rotate_into_a_cache(triton: ModuleType, rows: int, q_heads: int, k_heads: int, size: int) -> None:
    """Heads are views of one product; the cache's other numbers stay."""
    cos, sin = numbers(2, rows, size, dtype=torch.float16), numbers(3, rows, size, dtype=torch.float16)
    joint = numbers(0, rows, q_heads + 2 * k_heads, size, dtype=torch.float16)
    q, k, v = joint.split([q_heads, k_heads, k_heads], dim=1)
    places = torch.tensor([6, 0, 3, 2, 1])[:rows]
    caches = [numbers(4, 2, rows + 1, 7, k_heads, size, dtype=torch.float16) for _ in range(2)]
    found = triton.rotate_into(q, k, v, cos, sin, *caches[0], places)
    wanted = ops.rotate_into(q, k, v, cos, sin, *caches[1], places)
    assert torch.equal(found, wanted) and torch.equal(*caches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 100), (3, 256), (2, 9000)])
def test_sampling(triton: ModuleType, rows: int, width: int, dtype: torch.dtype) -> None:
    """The tokens of plain torch; sums up to one of 2^40 or so, where two exponential functions round differently."""
    logits = 5 * numbers(0, rows, width, dtype=dtype)
    logits[:, 1::2] = -torch.inf
    largest, temperatures = logits.amax(dim=1, keepdim=True), torch.tensor([0.7, 1.0, 2.0, 0.1]).double()[:rows]
    sums = sampling.block_sums(logits, largest, temperatures)
    found = triton.block_sums(logits, largest, temperatures)
    assert found.shape == sums.shape and bool(((found - sums).abs() <= sums >> 40).all())
    for uniform in (0.0, 0.3, 0.99, 1 - 2.0**-53):
        uniforms = torch.full((rows,), uniform, dtype=torch.float64)
        tokens = triton.draw_in_block(logits, largest, temperatures, uniforms, sums)
        assert torch.equal(tokens, sampling.sample(logits, largest, uniforms, temperatures))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_draw_from_no_distribution_is_a_token(triton: ModuleType, bad: float) -> None:
    logits = numbers(0, 1, 300)
    logits[0, 7] = bad
    largest, one = logits.amax(dim=1, keepdim=True), torch.ones(1, dtype=torch.float64)
    with np.errstate(invalid="ignore"):
        sums = triton.block_sums(logits, largest, one)
        token = triton.draw_in_block(logits, largest, one, 0.5 * one, sums)
    assert 0 <= int(token) < 300


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 5), (4, 64), (2, 4096), (2, 4099)])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_drop(triton: ModuleType, tokens: int, width: int, p: float, dtype: torch.dtype) -> None:
    """The same draws: the reference's generator gives the published words (test_functions)."""
    x, added = numbers(0, tokens, width, dtype=dtype), numbers(1, tokens, width, dtype=dtype)
    seeds = torch.tensor([(1 << 62) + 12345, 7, -3, 1 << 33])[:tokens]
    places = torch.tensor([0, 1, 70_000, 2])[:tokens]
    for also in (None, added):
        found, wanted = triton.drop(x, seeds, places, 3, p, also), ops.drop(x, seeds, places, 3, p, also)
        same(found, wanted)
        assert torch.equal(found == 0, wanted == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 9), (1, 1), (4, 100), (3, 4096), (2, 9000)])
def test_pick(triton: ModuleType, rows: int, width: int, dtype: torch.dtype) -> None:
    logits = 5 * numbers(0, rows, width, dtype=dtype)
    if width > 4096 and rows:
        logits[0, :4096] = -torch.inf  # a whole block of what a model forbids
    ids = torch.full((rows,), width - 1)
    wanted = ops.pick(logits, ids)
    same(triton.pick(logits, ids), wanted)
    total = wanted[1]
    d_picked = numbers(1, rows)
    same(triton.pick_grad(d_picked, logits, ids, total), ops.pick_grad(d_picked, logits, ids, total))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pick_hides_no_number_that_is_not_finite(triton: ModuleType, bad: float) -> None:
    logits = numbers(0, 2, 5000)
    logits[1, 4500] = bad
    picked, _ = triton.pick(logits, torch.tensor([3, 3]))
    assert picked[0].isfinite() and not picked[1].isfinite()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedsim.kernels import layers_triton as module

B, F, D, I, L = "*bf16", "*fp32", "*fp64", "i32", "*i64"
HEADS = dict(Q_HEADS=32, Q_BLOCK=32, K_HEADS=8, K_BLOCK=8, half=64, HALF=64)
STRIDES = [f"{of}_{step}" for of in "qkv" for step in ("token", "head")]
STRIDES += [f"{of}_{step}" for of in ("keys", "values") for step in ("slot", "position", "head")]
CASES = [
    (module._norm_kernel, dict(x=B, delta=B, weight=B, total=B, out=B, rstd=F, num_rows=I, width=I, eps="fp32"),
     dict(ADD=True, ROWS=1, BLOCK=4096), 8),
    (module._norm_grad_kernel, dict(d_out=B, x=B, weight=B, rstd=F, d_total=B, d_x=B, num_rows=I, width=I),
     dict(ADD=True, ROWS=1, BLOCK=4096), 8),
    (module._silu_mul_kernel, dict(gate=B, up=B, out=B, gate_row=I, up_row=I, out_row=I, width=I), dict(BLOCK=1024), 4),
    (module._silu_mul_grad_kernel, dict(d_out=B, gate=B, up=B, d_gate=B, d_up=B, size=I), dict(BLOCK=1024), 4),
    (module._rotate_kernel, dict(q=B, k=B, cos=B, sin=B, q_out=B, k_out=B, q_token=I, q_head=I, k_token=I, k_head=I),
     dict(HEADS, INVERSE=True), 4),
    (module._rotate_into_kernel,
     dict(q=B, k=B, v=B, cos=B, sin=B, q_out=B, keys=B, values=B, places=L, **dict.fromkeys(STRIDES, I)), HEADS, 4),
    (module._block_sums_kernel,
     dict(logits=B, largest=B, temperatures=D, sums=L, width=I, num_blocks=I, factor="fp32"),
     dict(BLOCKS=16, BLOCK=256), 8),
    (module._draw_in_block_kernel,
     dict(logits=B, largest=B, temperatures=D, uniforms=D, sums=L, tokens=L, width=I, num_blocks=I, factor="fp32"),
     dict(BLOCKS=512, BLOCK=256), 4),
    (module._drop_kernel,
     dict(x=B, added=B, out=B, seeds=L, places=L, draw=I, width=I, kept_below="i64", factor="fp32"),
     dict(ADD=True, BLOCK=1024), 4),
    (module._pick_kernel, dict(logits=B, ids=L, picked=F, total=F, width=I), dict(BLOCK=4096), 8),
    (module._pick_grad_kernel, dict(d_picked=F, logits=B, ids=L, total=F, d_logits=B, width=I), dict(BLOCK=4096), 8),
]
for kernel, types, constants, warps in CASES:
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {(list(signature).index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, **(module.EXACT if "rotate" in kernel.__name__ else {})}
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, places), target=target, options=options)
        where = "local" if ".local" in made.asm["ptx"] else "registers"
        fused = made.asm["ptx"].count("fma.rn.bf16")
        print(kernel.__name__, capability, len(made.asm["cubin"]), where, fused)
"""


def test_kernels_compile_for_both_generations() -> None:
    """At 8B shapes, to machine code in registers; rotations round every product as transformers does."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 22
    for name, capability, size, where, num_fused in lines:
        assert int(size) > 1000 and where == "registers"
        if "rotate" in name and capability == "90":  # sm_80 has no other product of bf16 than a fused one with 0
            assert num_fused == "0"
