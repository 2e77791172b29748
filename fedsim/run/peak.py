"""Peak performance of the devices of a run: published figures of known GPUs, else measured.

The CPU's are measured on all ranks at the same time, as they compute: ranks that share cores share
their peak.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsim.base.ranks import Ranks

_SERIES_S = 0.12
"""Seconds of a series of measurements; there are two, and their difference is the spread."""

_BUFFER_BYTES = 2**26
"""More than a process's share of most caches, and little beside the memory of a run."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of dense matrix products and bytes/s of memory, and their source.

    Attributes:
        flops: FLOP/s.
        bytes_per_s: of memory.
        source: devices, and "measured" or "data sheet".
        spread: 1 − worse ÷ better of two measurements; 0 if published.
    """

    flops: float
    bytes_per_s: float
    source: str
    spread: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """One line of a data sheet: TFLOP/s without sparsity, and TB/s.

    Attributes:
        words: all of them are words of the device's name.
    """

    words: tuple[str, ...]
    bfloat16: float
    float32: float
    memory: float


# NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024) and L40S (2023); where they print
# tensor-core figures with sparsity, half of those. The first line that matches counts.
GPUS = (
    Gpu(("H200", "NVL"), 835.5, 60.0, 4.8),
    Gpu(("H200",), 989.5, 67.0, 4.8),
    Gpu(("H100", "NVL"), 835.5, 60.0, 3.9),
    Gpu(("H100", "PCIe"), 756.5, 51.0, 2.0),
    Gpu(("H100", "HBM3"), 989.5, 67.0, 3.35),
    Gpu(("A100", "SXM4", "80GB"), 312.0, 19.5, 2.039),
    Gpu(("A100", "80GB", "PCIe"), 312.0, 19.5, 1.935),
    Gpu(("A100", "40GB"), 312.0, 19.5, 1.555),
    Gpu(("L40S",), 362.05, 91.6, 0.864),
)


def run_peak(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of all devices of the run together; a GPU that several processes share counts once.

    Every rank must call it at the same point.
    """
    ranks.gather(None)  # measure side by side
    mine = device_peak(device, dtype, torch.get_num_threads())

    # Sum over devices; ranks that share a GPU have its UUID in common.
    place: int | str = ranks.rank
    if device.type != "cpu":
        place = str(torch.cuda.get_device_properties(device).uuid)
    each = dict(ranks.gather((place, mine)))
    flops = sum(peak.flops for peak in each.values())
    memory = sum(peak.bytes_per_s for peak in each.values())
    spread = max(peak.spread for peak in each.values())
    return Peak(flops, memory, f"{len(each)} x {mine.source}", spread)


@functools.cache
def device_peak(device: torch.device, dtype: torch.dtype, threads: int) -> Peak:
    """Peak of one device, of a CPU with so many threads; it is measured once in a process."""
    kind = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        unit = "thread" if threads == 1 else "threads"
        return _measured(device, dtype, 512, f"CPU {kind} on {threads} {unit}, measured")
    name = torch.cuda.get_device_name(device)
    sheet = published(name)
    if sheet is not None and dtype in (torch.bfloat16, torch.float32):
        teraflops = sheet.bfloat16 if dtype == torch.bfloat16 else sheet.float32
        return Peak(teraflops * 1e12, sheet.memory * 1e12, f"{name} {kind}, data sheet")
    return _measured(device, dtype, 8192, f"{name} {kind}, measured")


def published(name: str) -> Gpu | None:
    """The data sheet's line for a device name as CUDA gives it; None for an unknown device.

    A part of a device counts as unknown: its peak is not the device's. Parts are MIG instances
    ("MIG 1g.10gb") and virtual GPUs, whose names end with their memory and NVIDIA's letter for what
    they are licensed for ("L40S-24Q").
    """
    words = set(re.split("[ -]", name))
    if "MIG" in words or any(re.fullmatch(r"\d+[ABCQ]", word) for word in words):
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.words)), None)


def _measured(device: torch.device, dtype: torch.dtype, size: int, source: str) -> Peak:
    """Measure the peak: the best of two series of matrix products and of passes over a buffer.

    Args:
        size: of the square matrices.
    """
    # Matrices [size, size], and a buffer that each pass reads and writes.
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    buffer = torch.ones(_BUFFER_BYTES // 4, device=device)

    def product() -> object:
        return torch.mm(left, right, out=out)

    # Seconds of both, twice.
    series = [(_best(product, device), _best(buffer.neg_, device)) for _ in range(2)]
    products, passes = zip(*series, strict=True)
    spread = max(1 - min(seconds) / max(seconds) for seconds in (products, passes))
    flops = 2 * size**3 / min(products)
    bytes_per_s = 2 * _BUFFER_BYTES / min(passes)
    return Peak(flops, bytes_per_s, source, spread)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Shortest seconds of a call, the first one left out."""
    run()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _SERIES_S:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
