"""The trained embedded model on the device, in fp32 and bf16, against fp32 on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsim.attention.forward import IMPLEMENTATIONS, causal_lm
from fedsim.config.lora import LoraSettings
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import EMBEDDED, attach_lora
from tools.bench.measure import deterministic
from tools.bench.models import ModelSize
from tools.bench.stage import Bench, start_vector
from tools.gpu.fused import fused
from tools.gpu.parity import Sides, check_all
from tools.gpu.reference import Reference
from tools.gpu.replies import check_replies
from tools.gpu.report import Report, Setting

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSettings(r=8, alpha=16.0, dropout=0.0, targets=TARGETS)


def embedded(dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """The embedded model, frozen."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(EMBEDDED),
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    assert isinstance(loaded, PreTrainedModel)
    torch.nn.Module.to(loaded, device)
    return loaded.requires_grad_(False).eval()


def tiny_sides(dtype: torch.dtype, setting: Setting) -> Sides:
    """The model with fused layers on the device, and its plain reference on the CPU, with LoRA on every layer."""
    model = attach_lora(embedded(dtype, setting.device, IMPLEMENTATIONS["sdpa"]), LORA)
    fused(model, setting)
    adapter = FlatAdapter(model)
    start = start_vector(adapter)
    reference = Reference(embedded(dtype, torch.device("cpu"), "eager"), LORA, adapter.slots)
    vocabulary = int(causal_lm(model).config.get_text_config().vocab_size)
    return Sides(model, adapter, reference, start, vocabulary)


def run(setting: Setting, report: Report) -> None:
    """Everything in both dtypes, in a dry run in one; what exact mode computes under deterministic algorithms."""
    say = partial(print, flush=True)
    for dtype in (torch.float32,) if setting.dry else (torch.float32, torch.bfloat16):
        sides, of = tiny_sides(dtype, setting), f"embedded model, {str(dtype).removeprefix('torch.')}"
        with deterministic(True):
            check_all(report, sides, of)
        size = ModelSize("embedded", {"vocab_size": sides.vocab_size})
        bench = Bench(setting.device, size, torch.get_num_threads(), say=say)
        check_replies(report, sides, bench, 2 if setting.dry else 12, of)
