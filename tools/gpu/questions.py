"""Questions that only a GPU can answer, in a minute: cost of launches, SDPA's new shapes, collectives, a capture."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.nn import functional as F

from fedsim.attention.backends import leave_out_cudnn
from fedsim.base.ranks import Term
from fedsim.fused.ops import OPS
from fedsim.generate.graph import Capture, capture_cuda
from fedsim.parallel.sums import Summer
from tools.bench import models
from tools.bench.attention import available, checks_of, heads_of, packed_call
from tools.bench.generation import Called
from tools.bench.lengths import draw
from tools.bench.measure import seconds_of
from tools.bench.stage import Bench
from tools.gpu.report import Report, Setting

LAUNCHES: Final = 1000
SHAPES: Final = 10
BACKEND: Final = {True: "cpu:gloo,cuda:nccl", False: "gloo"}


def run(setting: Setting, report: Report) -> None:
    """Each question apart: one that breaks off fails alone."""
    size = models.MICRO if setting.dry else models.GPU
    bench = Bench(setting.device, size, torch.get_num_threads())
    for name, ask in {
        "device": _device,
        "launches": _launches,
        "attention's kernels": _attention,
        "SDPA's new shapes": _shapes,
        "collectives of one process": _collectives,
        "a captured graph": _graph,
    }.items():
        with report.guarding(f"{name}: breaks off"):
            ask(setting, report, bench)


def _device(setting: Setting, report: Report, bench: Bench) -> None:
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    if setting.cuda:
        found = torch.cuda.get_device_properties(setting.device)
        free, whole = torch.cuda.mem_get_info(setting.device)
        facts |= {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": whole,
            "free_bytes": free,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "architectures": torch.cuda.get_arch_list(),
        }
    report.figure("device", facts)
    report.figure("attention backends", available(bench))


def _launches(setting: Setting, report: Report, bench: Bench) -> None:
    """Host µs of a launch, with the device's queue never full for long."""
    x = torch.zeros(1, device=setting.device)
    gate = torch.zeros(1, 8, device=setting.device, dtype=bench.dtype)
    calls: dict[str, Callable[[], object]] = {
        "add_ of one number": lambda: x.add_(1.0),
        "fedsim's silu_mul of eight numbers": lambda: OPS.silu_mul(gate, gate),
    }
    for name, call in calls.items():
        seconds_of(call, setting.device)
        began = time.perf_counter()
        whole = seconds_of(lambda call=call: [call() for _ in range(LAUNCHES)], setting.device)  # type: ignore[misc]
        for _ in range(LAUNCHES // 10):
            call()
        host = time.perf_counter() - began - whole  # of a tenth as many, which no one waits for
        report.figure(f"{LAUNCHES} launches, {name}, µs each", round(1e6 * whole / LAUNCHES, 2))
        report.figure(f"{LAUNCHES // 10} launches, {name}, µs of the host each", round(1e7 * host / LAUNCHES, 2))
    report.add("1,000 additions of 1, and a warm-up's and 100 more: distance from the sum",
               abs(float(x) - (LAUNCHES + LAUNCHES // 10 + 1)), 0.0)  # fmt: skip


def _attention(setting: Setting, report: Report, bench: Bench) -> None:
    """Every backend against the definition in fp32, and a layer's pass over 16 rows: the first time, and later."""
    heads = heads_of(bench)
    lengths = [p + r for p, r in zip(draw("prompt", 16, 55.0), draw("reply", 16, 55.0), strict=True)]
    for name in available(bench):
        report.take(checks_of(name, bench))
        call = packed_call(name, lengths, heads, bench)
        first, *later = (1e3 * seconds_of(call, setting.device) for _ in range(6))
        words = f"{name}, a layer forward and backward, {sum(lengths)} tokens in 16 rows, ms"
        report.figure(words, {"first": round(first, 3), "later": round(median(later), 3)})


def _shapes(setting: Setting, report: Report, bench: Bench) -> None:
    """Shapes that SDPA has not seen, once without cuDNN's kernels and once with them if torch wants them."""
    heads = heads_of(bench)
    for with_cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        firsts, seconds = [], []
        for i in range(SHAPES):
            rows, length = 2 + i % 3, 101 + 13 * i
            parts = [
                torch.randn(rows, count, length, heads.size, device=setting.device, dtype=bench.dtype)
                for count in (heads.queries, heads.keys, heads.keys)
            ]

            def call(parts: list[torch.Tensor] = parts) -> None:
                q, k, v = (part.detach().requires_grad_() for part in parts)
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

            firsts.append(1e3 * seconds_of(call, setting.device))
            seconds.append(1e3 * seconds_of(call, setting.device))
        words = f"SDPA, {SHAPES} new shapes, cuDNN {'allowed' if with_cudnn else 'left out'}, ms forward and backward"
        found = {"first median": median(firsts[1:]), "first max": max(firsts[1:]), "again median": median(seconds)}
        report.figure(words, {name: round(value, 3) for name, value in found.items()})
    leave_out_cudnn()


def _collectives(setting: Setting, report: Report, bench: Bench) -> None:
    """A world of one process, whose sums over NCCL must give back what went in."""
    began = time.perf_counter()
    store = dist.HashStore()
    dist.init_process_group(BACKEND[setting.cuda], store=store, rank=0, world_size=1)
    try:
        device = setting.device
        whole = torch.arange(-5, 100_000, device=device) * (1 << 40)
        real = torch.linspace(-1e300, 1e300, 1001, dtype=torch.float64, device=device)
        single = torch.linspace(-3, 3, 1001, device=device)
        group = dist.new_group([0])
        for name, tensor, how in (
            ("int64 SUM", whole, dist.ReduceOp.SUM),
            ("fp64 MAX", real, dist.ReduceOp.MAX),
            ("fp32 SUM", single, dist.ReduceOp.SUM),
        ):
            for place, where in (("the world", None), ("a new group", group)):
                mine = tensor.clone()
                dist.all_reduce(mine, how, group=where)
                report.add(f"{name} over {place} of one: numbers that differ", float((mine != tensor).sum()), 0.0)
        box: list[Any] = [None]
        dist.all_gather_object(box, {"rank": 0})
        report.add("all_gather_object of one: objects that differ", float(box != [{"rank": 0}]), 0.0)
        terms = [Term(single, 0.25), Term(single.square(), 0.75)]
        for exact in (True, False):
            sums = [Summer(g, exact=exact, device=device).sum([terms], [len(single)], 2)[0] for g in (group, None)]
            words = f"{'exact' if exact else 'fast'} sums over a group of one against no group: numbers that differ"
            report.add(words, float((sums[0] != sums[1]).sum()), 0.0)
        report.figure(f"process group over {BACKEND[setting.cuda]}, made and used, s",
                      round(time.perf_counter() - began, 2))  # fmt: skip
    finally:
        dist.destroy_process_group()


def _graph(setting: Setting, report: Report, bench: Bench) -> None:
    """Three replays of a captured step; the capture itself computes nothing."""
    capture: Capture = capture_cuda if setting.cuda else Called
    x = torch.zeros(1000, device=setting.device)
    x.add_(1.0)
    began = time.perf_counter()
    graph = capture(lambda: x.add_(1.0))
    report.figure("capture of one kernel, ms", round(1e3 * (time.perf_counter() - began), 2))
    for _ in range(3):
        graph.replay()
    report.add("a captured addition, replayed three times: numbers that differ", float((x != 4.0).sum()), 0.0)
