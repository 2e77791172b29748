"""Kernels of the fused layers on the device against their plain forms, at 8B widths; then whole fused layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.fused import ops
from fedsim.fused.choice import Fused, fuse, fuse_layers
from fedsim.model.load import attach_lora
from tools.bench import models
from tools.bench.measure import seconds_of
from tools.bench.stage import PAPER_LORA
from tools.gpu.report import Report, Setting

EPS: Final = 1e-5
LIMITS: Final = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""‖kernel − plain‖ / ‖plain‖: both round at the same places, sums in another order; half a unit of bf16 is 2e-3."""

REPEATS: Final = 20


def fused(model: torch.nn.Module, setting: Setting) -> Fused:
    """Fuse a model's layers as a load does; in a dry run too, by the operators' plain forms."""
    return fuse(model) if setting.cuda else fuse_layers(model)


def run(setting: Setting, report: Report) -> None:
    """Every operator in fp32 and bf16, then the layers of an 8B-shaped model."""
    report.figure("why layers stay plain", ops.why_plain(setting.device) if setting.cuda else "a CPU")
    if setting.cuda:
        report.add("kernels cannot be used", float(bool(ops.why_plain(setting.device))), 0.0)
    for dtype in LIMITS:
        for name, arguments in _cases(setting, dtype).items():
            with report.guarding(f"{name}, {dtype}: breaks off"):
                _operator(setting, report, name, arguments, dtype)
    with report.guarding("layers break off"):
        _layers(setting, report)


def _cases(setting: Setting, dtype: torch.dtype) -> dict[str, Sequence[Any]]:
    """Arguments of every operator: 1,700 tokens of Llama-3.1-8B, or a few narrow ones."""
    tokens, width, wide, vocabulary, heads, keys, size = (
        (7, 40, 72, 100, 4, 2, 8) if setting.dry else (1700, 4096, 14336, 128256, 32, 8, 128)
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(setting.device, dtype)

    x, delta, d_out, weight = normal(tokens, width), normal(tokens, width), normal(tokens, width), normal(width)
    total, _, rstd = ops.norm(x, delta, weight, EPS)
    gate, up, d_wide = (normal(tokens, wide) for _ in range(3))
    q, k = normal(tokens, heads, size), normal(tokens, keys, size)
    angles = torch.linspace(0, 50, tokens * size, device=setting.device).view(tokens, size)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    seeds = torch.arange(tokens, device=setting.device) * 0x9E3779B97F4A7C1  # more than 32 bits
    places = torch.arange(tokens, device=setting.device)
    logits = 5 * normal(tokens // 2, vocabulary)
    ids = torch.randint(vocabulary, (tokens // 2,), generator=generator).to(setting.device)
    d_picked = torch.linspace(-1, 1, tokens // 2, device=setting.device)
    return {
        "norm": (x, None, weight, EPS),
        "norm of a sum": (x, delta, weight, EPS),
        "norm_grad": (d_out, total, weight, rstd, x),
        "silu_mul": (gate, up),
        "silu_mul_grad": (d_wide, gate, up),
        "rotate": (q, k, cos, sin, False),
        "rotate back": (q, k, cos, sin, True),
        "drop": (x, seeds, places, 3, 0.05, None),
        "drop onto": (x, seeds, places, 3, 0.05, delta),
        "pick": (logits, ids),
        "pick_grad": (d_picked, logits, ids, ops.pick(logits, ids)[1]),
    }


def _operator(setting: Setting, report: Report, name: str, arguments: Sequence[Any], dtype: torch.dtype) -> None:
    """One operator: results, and milliseconds of the kernel and of the plain form."""
    short = name.split()[0]
    kernel, plain = getattr(ops.OPS, short), getattr(ops, short)
    found, wanted = kernel(*arguments), plain(*arguments)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    distance = max((_distance(a, b) for a, b in pairs if b.numel()), default=0.0)
    label = f"{name}, {str(dtype).removeprefix('torch.')}"
    report.add(f"{label}: ‖kernel − plain‖ / ‖plain‖", distance, LIMITS[dtype])
    if name == "drop":
        report.add(f"{label}: other numbers are dropped", float(((found == 0) != (wanted == 0)).sum()), 0.0)
    ms, repeats = {}, 1 if setting.dry else REPEATS
    for what, function in (("kernel", kernel), ("plain", plain)):

        def call(function: Callable[..., object] = function) -> None:
            for _ in range(repeats):
                function(*arguments)

        ms[what] = round(1e3 * seconds_of(call, setting.device) / repeats, 4)
    report.figure(f"{label}, ms", ms)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """NaN where shapes or types differ."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("nan")
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _layers(setting: Setting, report: Report) -> None:
    """All layers of a short model must be fused: each was tried beside the plain one, value and gradients."""
    size = models.MICRO
    if not setting.dry:
        size = replace(models.GPU, config={**models.GPU.config, "num_hidden_layers": 2})
    for dtype in LIMITS:
        model = attach_lora(models.build(size, dtype, setting.device), PAPER_LORA)
        model.set_attn_implementation(IMPLEMENTATIONS["sdpa"])  # joint products leave rotations to it
        found = fused(model, setting)
        words = f"layers of a Llama in {str(dtype).removeprefix('torch.')}"
        report.add(f"{words} that stay plain", sum(found.refused.values()), 0.0, found.words())
        report.add(f"{words}: no layer is fused", float(not found.taken), 0.0)
