"""Layers on a CPU that are replaced: the same bits as the plain ones', in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsim.attention.forward import Rows, packed_logits
from fedsim.data.batch import collate
from fedsim.fused import same_bits
from fedsim.fused.choice import fuse
from tests.fused.test_choice import CPU, FAMILIES, made, outcome, random_rows

ALL = {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "Linear", "LlamaDecoderLayer"}


def replaced(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
@pytest.mark.parametrize(
    ("targets", "scaling", "dtype"),
    [
        (("q_proj", "v_proj"), 1.5, torch.float32),
        (("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 2.0, torch.float32),
        (("q_proj", "v_proj"), 2.0, torch.bfloat16),
    ],
)
def test_a_family_keeps_its_bits(name: str, targets: tuple[str, ...], scaling: float, dtype: torch.dtype) -> None:
    """Log-probabilities and gradients with dropout, and logits without gradients."""
    rows = random_rows(5)
    batch = collate(rows, CPU)
    found = []
    for is_fused in (False, True):
        model, adapter = made(FAMILIES[name][0], dtype, targets)
        for layer in model.modules():
            if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
                layer.scaling["default"] = scaling
        if is_fused:
            fuse(model)
            assert replaced(model), "every family has rotations, at least"
        values = outcome(model, adapter, rows)
        with torch.no_grad():
            logits = packed_logits(
                model.eval(), batch.input_ids, batch.spans.positions, Rows(batch.spans), batch.before_target
            )
        found.append((*values, logits))
    assert all(torch.equal(plain, other) for plain, other in zip(*found, strict=True))


def test_llama_is_replaced_as_a_whole() -> None:
    model, _ = made(FAMILIES["llama"][0])
    fuse(model)
    assert replaced(model) == ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_than_fp32_stay_plain(dtype: torch.dtype) -> None:
    """Of their norms and LoRA layers the plain ones round elsewhere."""
    model, _ = made(FAMILIES["llama"][0], dtype)
    fuse(model)
    assert not replaced(model) & {"LlamaRMSNorm", "Linear", "LlamaDecoderLayer"}


def test_switched_off_lora_is_left_out() -> None:
    model, _ = made(FAMILIES["llama"][0])
    fuse(model)
    batch = collate(random_rows(3), CPU)
    values = []
    for is_on in (True, False):
        with torch.no_grad():
            call = (batch.input_ids, batch.spans.positions, Rows(batch.spans), batch.before_target)
            if is_on:
                values.append(packed_logits(model.eval(), *call))
            else:
                with model.disable_adapter():
                    values.append(packed_logits(model, *call))
    assert not torch.equal(*values)


def test_a_wrong_gradient_would_be_seen() -> None:
    """Against autograd in fp64, the norm and the rotation."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: same_bits.add_norm(a, b, weight, 1e-3), (x, delta))
    q, k = (torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: same_bits.rotate(a, b, cos, sin), (q, k))
