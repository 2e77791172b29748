"""Order-independent sums on the device, bit by bit against the CPU's."""

from __future__ import annotations

import torch

from fedsim.base.ranks import Term
from fedsim.kernels import fixed_point
from fedsim.parallel.sums import Summer
from tools.bench.aggregation import differing, distances, moved
from tools.gpu.report import Report, Setting

SIZES = (1, 7, 1023, 1024, 1025, 100_003)
MIXED = (1024, 3333)  # numbers of a vector where each term has another dtype and stride
TERMS = tuple(range(18))  # passes of up to eight, and what is left


def run(setting: Setting, report: Report) -> None:
    """Every dtype, odd sizes and strides, no terms to seventeen; then the sums of a run, on the device and off it."""
    sizes = (1, 7, 1025) if setting.dry else SIZES
    for what, error in distances(fixed_point.accumulate_scaled, setting.device, sizes=sizes).items():
        report.add(f"the pass to fixed point, {what}: integers that differ", error, 0.0)
    terms = (0, 1, 2, 8, 9, 17) if setting.dry else TERMS
    error = sum(_mixed(setting.device, num, size) for num in terms for size in MIXED)
    name = f"the pass to fixed point, dtypes and strides mixed, {terms[0]} to {terms[-1]} terms: integers that differ"
    report.add(name, error, 0.0)
    report.add("exact sums on the device against the CPU's: numbers that differ", _sums(setting.device), 0.0)


def _mixed(device: torch.device, num: int, size: int) -> float:
    """Terms of every dtype and stride in turn, over many orders of magnitude."""
    generator = torch.Generator().manual_seed(31 * size + num)
    vectors = []
    for i in range(num):
        wide = torch.randn(3 * size, generator=generator) * 10.0 ** (torch.rand(3 * size, generator=generator) * 12 - 9)
        kinds = [wide[:size], wide[::3], wide[:size].bfloat16(), wide.double()[1::3], wide.bfloat16()[::3]]
        vectors.append(kinds[i % len(kinds)])
    factors = torch.linspace(-3e14, 5e14, max(1, num), dtype=torch.float64)[:num]
    want, got = (torch.full((size,), 5, device=place) for place in (torch.device("cpu"), device))
    fixed_point.accumulate_scaled(want, vectors, factors)
    fixed_point.accumulate_scaled(got, [moved(vector, device) for vector in vectors], factors.to(device))
    return differing(got.cpu(), want)


def _vectors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(200_003, generator=generator) * 10.0**-i for i in range(7)]


def _sums(device: torch.device) -> float:
    """The whole of an exact sum, as a run makes it."""
    vectors, found = _vectors(), []
    for place in (torch.device("cpu"), device):
        terms = [Term(vector.to(place), 1.0 + i) for i, vector in enumerate(vectors)]
        (total,) = Summer(None, exact=True, device=place).sum([terms], [len(vectors[0])], len(terms))
        found.append(total.cpu())
    return differing(*found)
