"""The Triton accumulation: in the interpreter the bits of the plain-torch one; compiled, no contraction."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fedsim import kernels
from fedsim.kernels import fixed_point
from fedsim.parallel.sums import Summer
from fedsim.ranks import Term


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    """The module with its kernel interpreted: Triton reads the variable where a kernel is defined."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if sys.modules.pop("fedsim.kernels.fixed_point_triton", None):
        del kernels.fixed_point_triton  # else the import below takes the module that is compiled
    from fedsim.kernels import fixed_point_triton

    yield fixed_point_triton
    del sys.modules["fedsim.kernels.fixed_point_triton"], kernels.fixed_point_triton
    os.environ.pop("TRITON_INTERPRET")
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


def some_vectors(size: int, num: int) -> list[torch.Tensor]:
    """Of every dtype and stride in turn, over many orders of magnitude."""
    g = torch.Generator().manual_seed(size * 31 + num)
    vectors = []
    for i in range(num):
        wide = torch.randn(3 * size, generator=g) * 10.0 ** (torch.rand(3 * size, generator=g) * 12 - 9)
        kinds = [wide[:size], wide[::3], wide[:size].bfloat16(), wide.double()[1::3], wide.bfloat16()[::3]]
        vectors.append(kinds[i % len(kinds)])
    return vectors


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 3333])
@pytest.mark.parametrize("num", [0, 1, 2, 5, 8, 9, 17])
def test_same_bits_as_the_reference(kernel: ModuleType, size: int, num: int) -> None:
    vectors = some_vectors(size, num)
    factors = torch.linspace(-3e14, 5e14, max(1, num), dtype=torch.float64)[:num]
    want, got = torch.full((size,), 5), torch.full((size,), 7)
    fixed_point.accumulate_torch(want, vectors, factors)
    kernel.accumulate(got, vectors, factors)
    assert torch.equal(got, want)


def test_halves_limits_and_denormals(kernel: ModuleType) -> None:
    halves = [n + 0.5 for n in range(-6, 6)]
    edges = [s * (2.0**e + d) for s in (1, -1) for e in (50, 51, 52, 53, 60) for d in (-1, -0.5, 0, 0.25, 0.5, 0.75, 1)]
    limits = [2.0**62 - 2**10, -(2.0**62), 0.0, -0.0, 5e-324, 0.49999999999999994, -0.49999999999999994]
    vector = torch.tensor([*halves, *edges, *limits], dtype=torch.float64)
    got = torch.empty(len(vector), dtype=torch.int64)
    kernel.accumulate(got, [vector], torch.ones(1, dtype=torch.float64))
    assert got.tolist() == [round(v) for v in vector.tolist()]
    fp32 = torch.tensor([1e-45, -3e-45, 1.1754944e-38, 3.4e38])
    want = torch.empty(4, dtype=torch.int64)
    factors = torch.tensor([2.0**-67], dtype=torch.float64)
    fixed_point.accumulate_torch(want, [fp32], factors)
    kernel.accumulate(got := torch.empty_like(want), [fp32], factors)
    assert torch.equal(got, want) and int(got[3]) > 2**60


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sums_with_the_kernel(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """The dispatch reaches the kernel; whole sums have the same bits; a term that is not finite spoils its segment."""
    clean = [Term(v, w) for v, w in zip(some_vectors(1025, 5), (3.0, -0.1, 70.0, 1.5, 2.0), strict=True)]
    spoilt = [Term(torch.tensor([1.0, bad, 2.0])), Term(torch.ones(3))]
    (want,) = Summer(None, exact=True).sum([clean], [1025], 5)
    calls = []
    monkeypatch.setattr(fixed_point, "takes_triton", lambda device: True)
    monkeypatch.setattr(kernel, "accumulate", lambda *a, f=kernel.accumulate: (calls.append(a), f(*a)))
    got, nothing = Summer(None, exact=True).sum([clean, spoilt], [1025, 3], 5)
    assert len(calls) == 2
    assert torch.equal(got, want) and nothing.isnan().all()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedsim.kernels import fixed_point_triton as module
types = {"total": "*i64", "vectors": ("*fp32", "*bf16"), "strides": ("i32", "i32"), "factors": "*fp64", "size": "i32"}
source = ASTSource(
    module._accumulate_kernel, {**types, "ADD": "constexpr", "BLOCK": "constexpr"}, {(5,): True, (6,): module.BLOCK}
)
for capability in (80, 90):
    print(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=module.OPTIONS).asm["ptx"])
"""


def test_compiled_code_rounds_every_product() -> None:
    """PTX for A100 and H100/H200: an ``.rn`` product is never contracted into a fused multiply-add."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mul.rn.f64") >= 2 and "cvt.rzi.s64.f64" in done.stdout
    assert not re.findall(r"fma\S*\.f64|\b(?:mul|add|sub)\.f64", done.stdout)
