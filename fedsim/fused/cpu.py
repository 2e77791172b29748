"""Replacement of Llama's layers in fp32 on a CPU by :mod:`fedsim.fused.same_bits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.fused import same_bits
from fedsim.fused.joint import can_be_fused_lora, uses_default_adapter
from fedsim.fused.layers import (
    Forward,
    attention_with,
    decoder_layer_with,
    epsilon_of,
    is_llamas,
    rotating,
)


def fuse_same_bits(model: nn.Module) -> list[nn.Module]:
    """Replace the forward pass of layers whose results stay the same, bit for bit.

    Returns:
        The modules that are replaced.
    """
    found = []
    for make in (_norm, _feed, _attention, _lora, _layer):
        for module in model.modules():
            forward = make(module)
            if forward is not None:
                module.forward = forward
                found.append(module)
    return found


def _is_fp32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _norm(module: nn.Module) -> Forward | None:
    norm: Any = module
    if not is_llamas(module, "LlamaRMSNorm"):
        return None
    if norm.weight.requires_grad or not _is_fp32(norm.weight):
        return None
    plain, weight, eps = norm.forward, norm.weight, epsilon_of(norm)
    if eps is None:
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32:
            out: Tensor = plain(hidden_states)
            return out
        return same_bits.norm(hidden_states, weight, eps)

    return forward


def _feed(module: nn.Module) -> Forward | None:
    feed: Any = module
    if not is_llamas(module, "LlamaMLP") or "SiLU" not in type(feed.act_fn).__name__:
        return None

    def forward(x: Tensor) -> Tensor:
        inner = same_bits.silu_mul(feed.gate_proj(x), feed.up_proj(x))
        out: Tensor = feed.down_proj(inner)
        return out

    return forward


_rotate = rotating(same_bits.rotate)


def _attention(module: nn.Module) -> Forward | None:
    return attention_with(module, _rotate)


def _lora(module: nn.Module) -> Forward | None:
    layer: Any = module
    if not can_be_fused_lora(layer):
        return None
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    if not all(_is_fp32(part.weight) for part in (base, a, b)):
        return None
    plain = layer.forward

    # Another adapter, or one that is off or merged, stays plain.
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_plain = not uses_default_adapter(layer) or args or kwargs
        if is_plain or x.dtype != torch.float32:
            return plain(x, *args, **kwargs)
        # In the order of PEFT's layer: the base product, then dropout's draws.
        out = base(x)
        dropped = layer.lora_dropout["default"](x)
        return same_bits.lora(dropped, out, a.weight, b.weight, layer.scaling["default"])

    return forward


def _layer(module: nn.Module) -> Forward | None:
    """Llama's decoder layer with norms that can be replaced; None for another module."""
    if not is_llamas(module, "LlamaDecoderLayer"):
        return None
    layer: Any = module
    if _norm(layer.input_layernorm) is None or _norm(layer.post_attention_layernorm) is None:
        return None
    return decoder_layer_with(module, same_bits.add_norm, feed_takes_residual=False)
