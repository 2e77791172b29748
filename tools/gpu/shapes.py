"""Llama-3.1-8B's shapes, a few layers of random weights in bf16, against fp32 on the same device."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora
from tools.bench import models
from tools.bench.attention import AttentionStage
from tools.bench.stage import PAPER_LORA, Bench, give_memory_back, start_vector
from tools.gpu.fused import fused
from tools.gpu.parity import Sides, check_all
from tools.gpu.reference import Reference
from tools.gpu.replies import check_replies
from tools.gpu.report import Report, Setting

LAYERS = 3


def shapes_bench(setting: Setting) -> Bench:
    """Full width and full vocabulary on a GPU; the benchmark's micro model in a dry run."""
    size = models.MICRO
    if not setting.dry:
        size = replace(models.GPU, config={**models.GPU.config, "num_hidden_layers": LAYERS})
    return Bench(setting.device, size, torch.get_num_threads())


def random_sides(bench: Bench, setting: Setting) -> Sides:
    """Random weights in bf16 with fused layers, and the same in fp32 with plain ones, with the paper's LoRA."""
    model = attach_lora(models.build(bench.size, torch.bfloat16, bench.device, "fedsim_fused"), PAPER_LORA)
    fused(model, setting)
    adapter = FlatAdapter(model)
    twin = models.build(bench.size, torch.bfloat16, bench.device, "eager")
    return Sides(
        model, adapter, Reference(twin, PAPER_LORA, adapter.slots), start_vector(adapter), bench.size.vocab_size
    )


def run(setting: Setting, report: Report) -> None:
    """Attention alone as the benchmark checks it, then whole passes and replies."""
    bench = shapes_bench(setting)
    with report.guarding("attention's checks break off"):
        report.take(AttentionStage().check(bench), "8B heads: " if not setting.dry else "micro heads: ")
    give_memory_back(bench.device)
    sides = random_sides(bench, setting)
    of = f"{bench.size.name} shape, {bench.size.config['num_hidden_layers']} layers, bfloat16"
    check_all(report, sides, of)
    check_replies(report, sides, bench, 2 if setting.dry else 8, of)
