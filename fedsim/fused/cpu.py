"""Which layers of a model in fp32 on a CPU compute by :mod:`fedsim.fused.same_bits`: those whose code is Llama's."""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fedsim.fused import choice, same_bits


def fuse_same_bits(model: nn.Module) -> list[nn.Module]:
    """Replace the forward pass of layers whose results stay the same, bit for bit.

    Returns:
        The modules that are replaced.
    """
    found = []
    for make in (_norm, _feed, _attention, _lora, _layer):  # a decoder layer asks for its norms
        for module in model.modules():
            forward = make(module)
            if forward is not None:
                module.forward = forward
                found.append(module)
    return found


def _is_llamas(module: nn.Module, kind: str) -> bool:
    """Whether a module's forward pass is the code of one of transformers' Llama."""
    return choice._same_function(getattr(type(module), "forward", None), getattr(modeling_llama, kind).forward)


def _is_fp32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _norm(module: nn.Module) -> choice.Forward | None:
    if not _is_llamas(module, "LlamaRMSNorm") or module.weight.requires_grad or not _is_fp32(module.weight):  # type: ignore[arg-type]
        return None
    plain, weight, eps = module.forward, module.weight, choice._epsilon(module)
    if eps is None:
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32:
            return plain(hidden_states)
        return same_bits.norm(hidden_states, weight, eps)  # type: ignore[arg-type]

    return forward


def _feed(module: nn.Module) -> choice.Forward | None:
    feed: Any = module
    if not _is_llamas(module, "LlamaMLP") or "SiLU" not in type(feed.act_fn).__name__:
        return None

    def forward(x: Tensor) -> Tensor:
        out: Tensor = feed.down_proj(same_bits.silu_mul(feed.gate_proj(x), feed.up_proj(x)))
        return out

    return forward


def _attention(module: nn.Module) -> choice.Forward | None:
    """The module's own forward pass, but for the function that rotates queries and keys."""
    plain = getattr(type(module), "forward", None)
    name = "apply_rotary_pos_emb"
    if not isinstance(plain, types.FunctionType) or name not in plain.__code__.co_names or plain.__closure__:
        return None
    if not choice._rotates_as(plain.__globals__.get(name), modeling_llama.apply_rotary_pos_emb):
        return None
    copy = types.FunctionType(plain.__code__, {**plain.__globals__, name: _rotate}, name, plain.__defaults__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return types.MethodType(copy, module)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    fits = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1] and cos.dim() == 3 and unsqueeze_dim == 1
    if not fits or not q.dtype == k.dtype == cos.dtype == sin.dtype or q.shape[-1] % 2:
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return same_bits.rotate(q, k, cos, sin)


def _lora(module: nn.Module) -> choice.Forward | None:
    layer: Any = module
    if type(module) is not LoraLinear or list(layer.lora_A) != ["default"] or layer.lora_variant:
        return None
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    if type(base) is not nn.Linear or a.bias is not None or b.bias is not None:
        return None
    if not all(_is_fp32(part.weight) for part in (base, a, b)):
        return None
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_plain = layer.disable_adapters or layer.merged or layer.active_adapters != ["default"] or args or kwargs
        if is_plain or x.dtype != torch.float32:
            return plain(x, *args, **kwargs)
        out = base(x)
        return same_bits.lora(layer.lora_dropout["default"](x), out, a.weight, b.weight, layer.scaling["default"])

    return forward


def _layer(module: nn.Module) -> choice.Forward | None:
    """Llama's decoder layer, whose norms are replaced already."""
    if not _is_llamas(module, "LlamaDecoderLayer"):
        return None
    layer: Any = module
    first, second, feed = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
    if _norm(first) is None or _norm(second) is None:
        return None
    first_eps, second_eps = choice._epsilon(first), choice._epsilon(second)
    assert first_eps is not None and second_eps is not None, "a replaced norm has one"
    plain = module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or hidden_states.dtype != torch.float32:
            return plain(hidden_states, *args, **kwargs)
        before, normed = same_bits.add_norm(hidden_states, None, first.weight, first_eps)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        between, normed = same_bits.add_norm(before, attended, second.weight, second_eps)
        out: Tensor = between + feed(normed)
        return out

    return forward
