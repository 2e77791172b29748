"""Recognition of layers by their code, and their forward passes with some functions replaced."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

Forward = Callable[..., Any]

AddNorm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
"""``(x, delta, weight, epsilon)`` → the sum of ``x`` and ``delta``, and the normed sum."""

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(queries, keys, cosines, sines)`` → both rotated."""

ROTATION = "apply_rotary_pos_emb"
"""Name of transformers' function for rotary positions."""


def same_function(a: Any, b: Any) -> bool:
    """Return whether two functions are the same code, without their decorators."""
    a, b = (inspect.unwrap(function) if callable(function) else function for function in (a, b))
    if not isinstance(a, types.FunctionType) or not isinstance(b, types.FunctionType):
        return False
    for part in ("co_code", "co_names", "co_varnames"):
        if getattr(a.__code__, part) != getattr(b.__code__, part):
            return False
    return a.__defaults__ == b.__defaults__ and _constants(a) == _constants(b)


def _constants(function: types.FunctionType) -> list[Any]:
    """Constants of a function without texts, of which its docstring is one."""
    return [constant for constant in function.__code__.co_consts if not isinstance(constant, str)]


def is_llamas(module: nn.Module, kind: str) -> bool:
    """Return whether a module's forward pass has the code of a class of transformers' Llama.

    Args:
        kind: name of the class, such as ``LlamaMLP``.
    """
    wanted = getattr(modeling_llama, kind).forward
    return same_function(getattr(type(module), "forward", None), wanted)


def epsilon_of(norm: nn.Module) -> float | None:
    """The number that a norm adds under its root; None if it has none, or two."""
    values = [getattr(norm, name, None) for name in ("variance_epsilon", "eps")]
    known = [value for value in values if isinstance(value, float)]
    return known[0] if len(known) == 1 else None


def rotating(rotate: Rotate) -> Forward:
    """Give ``rotate`` the arguments of transformers' ``apply_rotary_pos_emb``.

    Tensors fit that have one type and one, even head size, and cosines ``[1 or batch, length, head
    size]``; for others transformers' function is called.
    """

    def rotated(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        unsqueeze_dim: int = 1,
    ) -> tuple[Tensor, Tensor]:
        one_size = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
        one_type = q.dtype == k.dtype == cos.dtype == sin.dtype
        is_even = q.shape[-1] % 2 == 0
        fits = one_size and one_type and is_even and cos.dim() == 3 and q.stride(-1) == 1
        if not fits or unsqueeze_dim != 1:
            return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotate(q, k, cos, sin)

    return rotated


def attention_with(module: nn.Module, rotated: Forward) -> Forward | None:
    """An attention's forward pass with ``rotated`` as its function for rotary positions.

    None if its class's forward pass does not call transformers' function, as Llama has it.
    """
    plain = getattr(type(module), "forward", None)
    if not isinstance(plain, types.FunctionType) or plain.__closure__:
        return None
    if ROTATION not in plain.__code__.co_names:
        return None

    # The function that it calls, and the one that this calls, must be Llama's.
    called, wanted = plain.__globals__.get(ROTATION), modeling_llama.apply_rotary_pos_emb
    halves = [getattr(each, "__globals__", {}).get("rotate_half") for each in (called, wanted)]
    if not same_function(called, wanted) or not same_function(*halves):
        return None

    # The same code, in which the name of the function means another one.
    names = {**plain.__globals__, ROTATION: rotated}
    copy = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return types.MethodType(copy, module)


def decoder_layer_with(
    module: nn.Module,
    add_norm: AddNorm,
    *,
    feed_takes_residual: bool,
) -> Forward | None:
    """Forward pass of Llama's decoder layer with each sum and the norm behind it as one function.

    None for another module.

    Args:
        module: the layer.
        add_norm: computes a sum and its norm.
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
        # [batch, length, width]: the residual stream before attention, and after it.
        before, normed = add_norm(hidden_states, None, first.weight, first_eps)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        between, normed = add_norm(before, attended, second.weight, second_eps)
        if feed_takes_residual:
            out: Tensor = layer.mlp(normed, between)
            return out
        return between + layer.mlp(normed)

    return forward
