"""Choice of the layers that use fused functions (:mod:`fedsim.fused.functions`), after trials.

A layer is a candidate by its structure: a norm with one weight and an epsilon, a gated feed-forward
part with SiLU, an attention that calls transformers' ``apply_rotary_pos_emb``, a plain LoRA layer,
Llama's decoder layer. Each is tried on a few random tokens and compared with the plain one, values
and gradients; one that differs, such as Gemma's norms of 1 + weight, stays plain. Parameters and
names of modules do not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from fedsim.base.errors import reason
from fedsim.base.ranks import OneRank, Ranks
from fedsim.fused import functions as fused
from fedsim.fused.cpu import fuse_same_bits
from fedsim.fused.joint import (
    ATTRIBUTE,
    JointLinear,
    can_be_fused_lora,
    can_be_joint,
    hold_adapters,
    is_frozen_linear,
    uses_default_adapter,
)
from fedsim.fused.layers import (
    Forward,
    attention_with,
    decoder_layer_with,
    epsilon_of,
    is_llamas,
    rotating,
    same_function,
)
from fedsim.fused.ops import OPS, agree_on_kernels, runs_fused, why_plain

NUM_TOKENS: Final = 5
"""Tokens of a trial."""

WIDEST: Final = 1 << 14
"""Widest row that a norm's kernel holds at once."""

LIMITS: Final = {
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}
"""Largest ‖fused − plain‖ / ‖plain‖ by rounding: at the same places, but with other sum orders."""


@dataclass
class Fused:
    """Layers that are fused, and candidates that are not.

    Attributes:
        taken: number of fused layers, by kind.
        refused: number of layers that are not fused, by kind and reason.
        modules: the fused layers.
    """

    taken: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    modules: list[nn.Module] = field(default_factory=list)

    def words(self) -> str:
        """One line for the log; empty if there were no candidates."""
        parts = []
        if self.taken:
            kinds = [f"{num} {kind}" for kind, num in sorted(self.taken.items())]
            parts.append(f"fused: {', '.join(kinds)}")
        parts += [f"plain: {num} {why}" for why, num in sorted(self.refused.items())]
        return "; ".join(parts)


def fuse(model: nn.Module, ranks: Ranks | None = None, *, with_trials: bool = True) -> Fused:
    """Replace the forward passes of a model's layers by fused ones, if its device has them.

    On CUDA see :func:`runs_fused`. On a CPU :mod:`fedsim.fused.cpu` does it, with the plain layers'
    bits. Call it once all weights are frozen or adapted, PEFT's layers included.

    Args:
        model: changed in place.
        ranks: all call this for the same model, and fuse the same layers or none; None: only this
            process.
        with_trials: try each candidate; False takes all of them, as on a device that computes no
            numbers.
    """
    if ranks is None:
        ranks = OneRank()
    device = next(model.parameters()).device
    agree_on_kernels(device, ranks)

    # No kernels.
    if device.type == "cuda" and not runs_fused(device):
        return Fused(refused=Counter({f"model ({why_plain(device)})": 1}))
    if not runs_fused(device):
        if device.type == "cpu":
            fuse_same_bits(model)
        return Fused()

    # The same layers on all ranks, or none: names and kinds have to agree.
    found = fuse_layers(model, with_trials=with_trials)
    fused_ids = {id(module) for module in found.modules}
    fused_names = [name for name, module in model.named_modules() if id(module) in fused_ids]
    outcomes = ranks.gather((*fused_names, *sorted(found.taken.items())))
    if len(set(outcomes)) > 1:
        for module in found.modules:
            for name in ("forward", ATTRIBUTE):
                vars(module).pop(name, None)
        problem = "model (its layers passed their trials only on some ranks)"
        return Fused(refused=Counter({problem: 1}))
    return found


def fuse_layers(model: nn.Module, *, with_trials: bool = True) -> Fused:
    """Fuse layers as :func:`fuse`, on any device and only in this process."""
    found = Fused()
    for kind in _KINDS:  # a later kind may need an earlier one's forward pass
        for module in model.modules():
            forward = kind.make(module)
            if forward is None:
                continue
            problem = ""
            if with_trials:
                try:
                    problem = kind.trial(module, forward)
                except Exception as error:  # of any class: by a compiler, or an unfit kernel
                    problem = reason(error)
            if problem:
                vars(module).pop(ATTRIBUTE, None)
                found.refused[f"{kind.name} ({type(module).__name__}: {problem})"] += 1
            else:
                module.forward = forward
                found.taken[kind.name] += 1
                found.modules.append(module)
    return found


# --- norms ----------------------------------------------------------------------------------------


def _norm(module: nn.Module) -> Forward | None:
    """Fused norm of a frozen weight; None for another module."""
    parameters = dict(module.named_parameters())
    weight, eps = parameters.get("weight"), epsilon_of(module)
    if "RMSNorm" not in type(module).__name__ or len(parameters) != 1:
        return None
    if weight is None or eps is None:
        return None
    if weight.dim() != 1 or weight.requires_grad or len(weight) > WIDEST:
        return None
    plain = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != weight.dtype:
            return plain(hidden_states)
        return fused.norm(hidden_states, weight, eps)

    return forward


def _try_norm(module: Any, forward: Forward) -> str:
    x = _random(module.weight, NUM_TOKENS, len(module.weight))
    return _difference(module.forward, forward, {"hidden_states": 3 * x})


# --- feed-forward parts ---------------------------------------------------------------------------


def _feed_forward(module: nn.Module) -> Forward | None:
    """Fused gated feed-forward part, of which frozen layers are one function; None if not gated."""
    if not _is_gated(module):
        return None
    part: Any = module

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate, up, down = part.gate_proj, part.up_proj, part.down_proj
        if all(is_frozen_linear(layer) and layer.bias is None for layer in (gate, up, down)):
            return fused.feed_forward(x, gate.weight, up.weight, down.weight, residual)
        out: Tensor = down(fused.silu_mul(gate(x), up(x)))
        return out if residual is None else residual + out

    return forward


def _is_gated(module: nn.Module) -> bool:
    """Return whether a module computes ``down(silu(gate(x)) · up(x))``, by its parts."""
    parts = ("gate_proj", "up_proj", "down_proj")
    if {name for name, _ in module.named_children()} != {*parts, "act_fn"}:
        return False
    linear = all(isinstance(getattr(module, part), (nn.Linear, LoraLinear)) for part in parts)
    return linear and "SiLU" in type(module.act_fn).__name__


def _joint_feed_forward(module: nn.Module) -> Forward | None:
    """Gate and up as one product if there are no gradients; else the module's fused forward pass.

    None if the module has no fused forward pass yet, or cannot be joined.
    """
    part: Any = module
    if not _is_gated(module) or "forward" not in vars(module):
        return None
    if not can_be_joint([part.gate_proj, part.up_proj]):
        return None
    plain = module.forward
    joint = JointLinear([part.gate_proj, part.up_proj])
    setattr(module, ATTRIBUTE, joint)

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not joint.takes(x):
            return plain(x, residual)
        gate, up = joint(x.flatten(0, -2)).split(joint.sizes, dim=-1)  # [tokens, inner]
        OPS.silu_mul_(gate, up)  # in place: the largest activations of the pass
        down = part.down_proj
        if residual is not None and is_frozen_linear(down) and down.bias is None:
            out = torch.addmm(residual.flatten(0, -2), gate, down.weight.T)
            return out.view(residual.shape)
        out = down(gate).view(*x.shape[:-1], -1)
        return out if residual is None else residual + out

    return forward


def _try_feed_forward(module: Any, forward: Forward) -> str:
    weight = module.gate_proj.weight  # PEFT's layers have it too
    x = _random(weight, NUM_TOKENS, weight.shape[1])
    with _random_adapters(module):
        return _difference(module.forward, forward, {"x": x})


# --- rotary positions -----------------------------------------------------------------------------


_rotate = rotating(fused.rotate)


def _attention(module: nn.Module) -> Forward | None:
    return attention_with(module, _rotate)


def _try_rotation(module: Any, _: Forward) -> str:
    # Queries and keys [1, heads, tokens, size], cosines and sines [1, tokens, size].
    weight = next(module.parameters())
    size = int(getattr(module, "head_dim", 0))
    q, k = (_random(weight, 1, NUM_TOKENS, heads, size).transpose(1, 2) for heads in (4, 2))
    cos, sin = (_random(weight, 1, NUM_TOKENS, size, seed=seed) for seed in (1, 2))

    # Queries and keys in one tensor, [1, tokens, heads, size], since trials compare one.
    def joined(rotate: Forward) -> Forward:
        def joint(q: Tensor, k: Tensor) -> Tensor:
            q, k = rotate(q, k, cos, sin)
            return torch.cat([q.transpose(1, 2), k.transpose(1, 2)], dim=2)

        return joint

    plain = joined(modeling_llama.apply_rotary_pos_emb)
    return _difference(plain, joined(_rotate), {"q": q, "k": k})


# --- LoRA -----------------------------------------------------------------------------------------


def _lora(module: nn.Module) -> Forward | None:
    """Fused linear layer with its adapter; calls that it does not cover stay plain."""
    layer: Any = module
    if not can_be_fused_lora(layer):
        return None
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT's dropout draws from a generator: while it is active the call stays plain.
        dropout = layer.lora_dropout["default"]
        is_plain = not uses_default_adapter(layer) or args or kwargs
        known = isinstance(dropout, (nn.Identity, fused.MaskedDropout)) or not dropout.training
        if is_plain or not known or x.dtype != base.weight.dtype:
            return plain(x, *args, **kwargs)
        draw = dropout.draw(x) if isinstance(dropout, fused.MaskedDropout) else None
        scaling = layer.scaling["default"]
        return fused.lora(x, base.weight, base.bias, a.weight, b.weight, scaling, draw)

    return forward


def _try_lora(module: Any, forward: Forward) -> str:
    """Compare gradients of both matrices too."""
    parameters = module.lora_A["default"].weight, module.lora_B["default"].weight
    x = _random(module.base_layer.weight, NUM_TOKENS, module.base_layer.in_features)
    with _random_adapters(module):
        return _difference(module.forward, forward, {"x": x}, parameters)


@contextmanager
def _random_adapters(module: nn.Module) -> Iterator[None]:
    """Use evaluation mode, and random LoRA matrices B instead of zeros, inside the block."""
    weights: list[Tensor] = []
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        weights += [b.weight for b in layer.lora_B.values()]
    saved = [weight.detach().clone() for weight in weights]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            for seed, weight in enumerate(weights):
                weight.copy_(_random(weight, *weight.shape, seed=seed) / weight.shape[1])
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)
        for part, mode in modes:
            part.training = mode


# --- attention ------------------------------------------------------------------------------------

_WINDOWS: Final[tuple[tuple[Any, Callable[[Any], int | None]], ...]] = (
    (modeling_llama.LlamaAttention, lambda module: None),
    (
        modeling_mistral.MistralAttention,
        lambda module: getattr(module.config, "sliding_window", None),
    ),
    (modeling_qwen2.Qwen2Attention, lambda module: module.sliding_window),
)
"""Attentions that :func:`_joint_attention` knows, and their sliding windows."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a pass, to be applied by :mod:`fedsim.attention.forward`.

    Attributes:
        cos: ``[1 or batch, length, head size]``.
        sin: likewise.
    """

    cos: Tensor
    sin: Tensor

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys ``[batch, heads, length, head size]``."""
        return fused.rotate(query, key, self.cos, self.sin)

    def rotated_into(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
    ) -> Tensor:
        """Rotate queries of one token a row, and write its rotated key and its value into a cache.

        Arguments and result as of :func:`fedsim.fused.ops.rotate_into`.
        """
        cos, sin = (part.flatten(0, 1) for part in (self.cos, self.sin))
        out: Tensor = OPS.rotate_into(query, key, value, cos, sin, keys, values, places)
        return out


def _joint_attention(module: nn.Module) -> Forward | None:
    """Queries, keys and values as one product if there are no gradients; else the present forward.

    None if the module's forward pass is not fused yet, or its attention cannot be joined.
    """
    attention: Any = module
    window: Callable[[Any], int | None] | None = None
    for kind, window_of_kind in _WINDOWS:
        if same_function(getattr(type(module), "forward", None), kind.forward):
            window = window_of_kind
            break
    if window is None or "forward" not in vars(module):
        return None
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    if not can_be_joint(layers):
        return None
    plain = module.forward
    joint, size, sliding = JointLinear(layers), attention.head_dim, window(attention)
    setattr(module, ATTRIBUTE, joint)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        cos, sin = position_embeddings
        fits = cos.dtype == hidden_states.dtype and cos.shape[-1] == size
        if past_key_values is not None or not fits or not joint.takes(hidden_states):
            args = (position_embeddings, attention_mask, past_key_values)
            return plain(hidden_states, *args, **kwargs)

        # Queries, keys and values, each [batch, heads, length, size].
        shape = hidden_states.shape[:-1]
        parts = joint(hidden_states.flatten(0, -2)).split(joint.sizes, dim=-1)
        heads = [part.view(*shape, -1, size).transpose(1, 2) for part in parts]

        attend: Any = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        out, weights = attend(
            attention,
            *heads,
            attention_mask,
            scaling=attention.scaling,
            sliding_window=sliding,
            rotation=Rotation(cos, sin),
            **kwargs,
        )
        return attention.o_proj(out.reshape(*shape, -1)), weights

    return forward


def _try_joint_attention(module: Any, forward: Forward) -> str:
    """Compare without gradients; rotation into a cache is tried with the kernels (:mod:`.ops`)."""
    weight = module.q_proj.weight
    cos, sin = (_random(weight, 1, NUM_TOKENS, module.head_dim, seed=seed) for seed in (1, 2))
    inputs = {"hidden_states": _random(weight, 1, NUM_TOKENS, weight.shape[1])}

    def of(function: Forward) -> Forward:
        return lambda hidden_states: function(hidden_states, (cos, sin), None)[0]

    return _joint_difference(module, of(module.forward), of(forward), inputs)


def _try_joint_feed_forward(module: Any, forward: Forward) -> str:
    # Without a residual, and with one.
    weight = module.gate_proj.weight
    x, residual = (_random(weight, 1, NUM_TOKENS, weight.shape[1], seed=seed) for seed in (0, 1))

    def of(function: Forward) -> Forward:
        return lambda x: torch.cat([function(x), function(x, residual)])

    return _joint_difference(module, of(module.forward), of(forward), {"x": x})


def _joint_difference(
    module: nn.Module,
    plain: Forward,
    other: Forward,
    inputs: Mapping[str, Tensor],
) -> str:
    """Compare values of the layers one by one with their joint product, as :func:`_difference`."""
    with _random_adapters(module), torch.no_grad():
        wanted = {"out": plain(**inputs)}
        with hold_adapters(module):
            return _difference(lambda **_: wanted["out"], other, inputs)


# --- decoder layers -------------------------------------------------------------------------------


def _layer(module: nn.Module) -> Forward | None:
    """Fused forward pass of Llama's decoder layer with fused norms; None for another module."""
    if not is_llamas(module, "LlamaDecoderLayer"):
        return None
    layer: Any = module
    norms = layer.input_layernorm, layer.post_attention_layernorm
    # A fused forward pass is an attribute of the module itself.
    if not all("forward" in vars(norm) and _norm(norm) is not None for norm in norms):
        return None
    takes_residual = _is_gated(layer.mlp) and "forward" in vars(layer.mlp)
    return decoder_layer_with(module, fused.add_norm, feed_takes_residual=takes_residual)


def _try_layer(module: Any, forward: Forward) -> str:
    """Compare with a simple map in place of its attention, which is tried by itself."""
    attention = module.self_attn
    fused_forward = vars(attention).get("forward")  # None if it is the class's
    attention.forward = lambda hidden_states, **_: (hidden_states.roll(1, -1), None)
    try:
        weight = module.input_layernorm.weight
        x = _random(weight, 1, NUM_TOKENS, len(weight))
        with _random_adapters(module):
            return _difference(module.forward, forward, {"hidden_states": x})
    finally:
        del attention.forward
        if fused_forward is not None:
            attention.forward = fused_forward


# --- trials ---------------------------------------------------------------------------------------


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers on the device and in the dtype of ``like``, from a new generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _difference(
    plain: Forward,
    other: Forward,
    inputs: Mapping[str, Tensor],
    parameters: tuple[Tensor, ...] = (),
) -> str:
    """Compare values and gradients of two functions; return the problem of ``other``, or "".

    They may differ by rounding. Under :func:`torch.no_grad` only values are compared.

    Args:
        inputs: arguments by name, to which gradients are compared.
        parameters: further tensors to which gradients are compared.
    """
    limit = LIMITS.get(next(iter(inputs.values())).dtype, 0.0)
    want = list(_results(plain, inputs, parameters))
    got = list(_results(other, inputs, parameters))
    for wanted, found in zip(want, got, strict=True):
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            return "gives another shape or type"
        difference = (found.double() - wanted.double()).norm()
        distance = float(difference / wanted.double().norm().clamp_min(1e-30))
        if not distance <= limit:  # NaN too
            return "computes something else"
    return ""


def _results(
    function: Forward,
    inputs: Mapping[str, Tensor],
    parameters: tuple[Tensor, ...],
) -> Iterator[Tensor]:
    """Value of a function, and gradients of its product with fixed numbers, returned not added."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    yield out.detach()
    if torch.is_grad_enabled():
        weight = _random(out, *out.shape, seed=3)
        yield from torch.autograd.grad(out, [*leaves.values(), *parameters], weight)


@dataclass(frozen=True)
class _Kind:
    """A kind of layer.

    Attributes:
        name: for the log, in the plural.
        make: returns the fused forward pass of a module; None if the module is no such layer.
        trial: compares it with the module's present one; returns the problem, or "".
    """

    name: str
    make: Callable[[nn.Module], Forward | None]
    trial: Callable[[Any, Forward], str]


_KINDS: Final = (
    _Kind("norms", _norm, _try_norm),
    _Kind("feed-forward parts", _feed_forward, _try_feed_forward),
    _Kind("rotations", _attention, _try_rotation),
    _Kind("LoRA layers", _lora, _try_lora),
    _Kind("joint feed-forward products", _joint_feed_forward, _try_joint_feed_forward),
    _Kind("joint attention products", _joint_attention, _try_joint_attention),
    _Kind("decoder layers", _layer, _try_layer),  # of the parts above
)
