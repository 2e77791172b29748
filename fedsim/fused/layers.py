"""Layers recognised by their code, and their forward passes with other functions in place of parts."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

Forward = Callable[..., Any]

AddNorm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
"""``(x, delta, weight, epsilon)`` → the sum of ``x`` and ``delta``, and that normed."""

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(queries, keys, cosines, sines)`` → both rotated."""

ROTATION = "apply_rotary_pos_emb"


def same_function(a: Any, b: Any) -> bool:
    """Return whether two functions are the same code, below what decorates them."""
    a, b = (inspect.unwrap(function) if callable(function) else function for function in (a, b))
    if not isinstance(a, types.FunctionType) or not isinstance(b, types.FunctionType):
        return False
    return (
        a.__defaults__ == b.__defaults__
        and all(
            getattr(a.__code__, part) == getattr(b.__code__, part) for part in ("co_code", "co_names", "co_varnames")
        )
        and _constants(a) == _constants(b)
    )


def _constants(function: types.FunctionType) -> list[Any]:
    """A function's constants without texts, of which its docstring is one."""
    return [constant for constant in function.__code__.co_consts if not isinstance(constant, str)]


def is_llamas(module: nn.Module, kind: str) -> bool:
    """Return whether a module's forward pass is the code of transformers' Llama, such as ``LlamaMLP``."""
    return same_function(getattr(type(module), "forward", None), getattr(modeling_llama, kind).forward)


def epsilon_of(norm: nn.Module) -> float | None:
    """The number that a norm adds under its root; None where it has none, or two."""
    values = [getattr(norm, name, None) for name in ("variance_epsilon", "eps")]
    known = [value for value in values if isinstance(value, float)]
    return known[0] if len(known) == 1 else None


def rotating(rotate: Rotate) -> Forward:
    """``rotate`` under the arguments of transformers' ``apply_rotary_pos_emb``, which takes what does not fit.

    What fits has one type and head size, an even one, and cosines ``[1 or batch, length, head size]``.
    """

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        one_size = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
        one_type = q.dtype == k.dtype == cos.dtype == sin.dtype
        fits = one_size and one_type and q.shape[-1] % 2 == 0 and cos.dim() == 3 and q.stride(-1) == 1
        if not fits or unsqueeze_dim != 1:
            return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotate(q, k, cos, sin)

    return rotated


def attention_with(module: nn.Module, rotated: Forward) -> Forward | None:
    """An attention's own forward pass, but for the function that rotates queries and keys; None if it is no such."""
    plain = getattr(type(module), "forward", None)
    if not isinstance(plain, types.FunctionType) or ROTATION not in plain.__code__.co_names or plain.__closure__:
        return None
    own, wanted = plain.__globals__.get(ROTATION), modeling_llama.apply_rotary_pos_emb
    halves = [getattr(function, "__globals__", {}).get("rotate_half") for function in (own, wanted)]
    if not same_function(own, wanted) or not same_function(*halves):
        return None
    copy = types.FunctionType(
        plain.__code__, {**plain.__globals__, ROTATION: rotated}, plain.__name__, plain.__defaults__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return types.MethodType(copy, module)


def decoder_layer_with(module: nn.Module, add_norm: AddNorm, *, feed_takes_residual: bool) -> Forward | None:
    """The forward pass of Llama's decoder layer with each sum and the norm behind it as one; None if it is another's.

    Args:
        feed_takes_residual: the feed-forward part adds the residual itself.
    """
    if not is_llamas(module, "LlamaDecoderLayer"):
        return None
    layer: Any = module
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    first_eps, second_eps = epsilon_of(first), epsilon_of(second)
    if first_eps is None or second_eps is None:
        return None
    plain = module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or not hidden_states.dtype == first.weight.dtype == second.weight.dtype:
            return plain(hidden_states, *args, **kwargs)
        before, normed = add_norm(hidden_states, None, first.weight, first_eps)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        between, normed = add_norm(before, attended, second.weight, second_eps)
        out: Tensor = layer.mlp(normed, between) if feed_takes_residual else between + layer.mlp(normed)
        return out

    return forward
