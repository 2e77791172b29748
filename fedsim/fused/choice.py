"""Choice of the layers that compute by fused functions (:mod:`fedsim.fused.functions`), each after a trial.

A layer is a candidate by its structure: a norm with one weight and an epsilon, a gated feed-forward part with SiLU, an
attention that calls transformers' ``apply_rotary_pos_emb``, a plain LoRA layer, Llama's decoder layer. Each is tried on
a few random tokens beside the plain one, value and gradients; one that differs, Gemma's norms of 1 + weight say, stays
as it is. Parameters and names of modules stay as they are too.
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
"""The widest row that a norm's kernel holds at once."""

LIMITS: Final = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""‖fused − plain‖ / ‖plain‖ that rounding may make: both round at the same places, sums in another order."""


@dataclass
class Fused:
    """Layers that are fused, and candidates that are not.

    Attributes:
        taken: how many of each kind are fused.
        refused: why others are not, and how many.
        modules: that are fused.
    """

    taken: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    modules: list[nn.Module] = field(default_factory=list)

    def words(self) -> str:
        """One line for the log; empty where there were no candidates."""
        parts = []
        if self.taken:
            parts.append("fused: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.taken.items())))
        parts += [f"plain: {n} {why}" for why, n in sorted(self.refused.items())]
        return "; ".join(parts)


def fuse(model: nn.Module, ranks: Ranks | None = None, *, with_trials: bool = True) -> Fused:
    """Let a model's layers compute by fused functions where its device has them (:func:`runs_fused`).

    On a CPU by :mod:`fedsim.fused.cpu`, whose results are the plain layers' own.

    To be called once all weights are frozen or adapted, PEFT's layers included.

    Args:
        ranks: all of which call this for the same model, and fuse the same layers or none; None: this process alone.
        with_trials: try each candidate; False takes all of them, as on a device that computes no numbers.
    """
    ranks = ranks or OneRank()
    device = next(model.parameters()).device
    agree_on_kernels(device, ranks)
    if not runs_fused(device):
        if device.type == "cpu":
            fuse_same_bits(model)
        return Fused(refused=Counter({f"model ({why_plain(device)})": 1} if device.type == "cuda" else {}))
    found = fuse_layers(model, with_trials=with_trials)
    fused_names = [name for name, module in model.named_modules() if any(module is one for one in found.modules)]
    if len(set(ranks.gather((*fused_names, *sorted(found.taken.items()))))) > 1:
        for module in found.modules:
            for name in ("forward", ATTRIBUTE):
                vars(module).pop(name, None)
        return Fused(refused=Counter({"model (its layers passed their trials on some ranks alone)": 1}))
    return found


def fuse_layers(model: nn.Module, *, with_trials: bool = True) -> Fused:
    """:func:`fuse` on any device."""
    found = Fused()
    for kind in _KINDS:
        for module in model.modules():
            forward = kind.make(module)
            if forward is None:
                continue
            try:
                problem = kind.trial(module, forward) if with_trials else ""
            except Exception as error:  # whatever a compiler or a kernel that does not fit raises
                problem = reason(error)
            if problem:
                vars(module).pop(ATTRIBUTE, None)
                found.refused[f"{kind.name} ({type(module).__name__}: {problem})"] += 1
            else:
                module.forward = forward
                found.taken[kind.name] += 1
                found.modules.append(module)
    return found


# --- norms ---------------------------------------------------------------------------------------------------------


def _norm(module: nn.Module) -> Forward | None:
    parameters = dict(module.named_parameters())
    weight, eps = parameters.get("weight"), epsilon_of(module)
    if "RMSNorm" not in type(module).__name__ or len(parameters) != 1 or weight is None or eps is None:
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


# --- feed-forward parts --------------------------------------------------------------------------------------------


def _feed_forward(module: nn.Module) -> Forward | None:
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
    """Return whether a module computes ``down(silu(gate(x)) · up(x))``, judged by its parts."""
    parts = ("gate_proj", "up_proj", "down_proj")
    if {name for name, _ in module.named_children()} != {*parts, "act_fn"}:
        return False
    linear = all(isinstance(getattr(module, part), (nn.Linear, LoraLinear)) for part in parts)
    return linear and "SiLU" in type(module.act_fn).__name__


def _joint_feed_forward(module: nn.Module) -> Forward | None:
    """Gate and up as one product where there are no gradients; else the fused forward pass that is there already."""
    part: Any = module
    if not _is_gated(module) or "forward" not in vars(module) or not can_be_joint([part.gate_proj, part.up_proj]):
        return None
    plain = module.forward
    joint = JointLinear([part.gate_proj, part.up_proj])
    setattr(module, ATTRIBUTE, joint)

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not joint.takes(x):
            return plain(x, residual)
        gate, up = joint(x.flatten(0, -2)).split(joint.sizes, dim=-1)
        OPS.silu_mul_(gate, up)  # in place: the largest activations of the pass
        down = part.down_proj
        if residual is not None and is_frozen_linear(down) and down.bias is None:
            return torch.addmm(residual.flatten(0, -2), gate, down.weight.T).view(residual.shape)
        out: Tensor = down(gate).view(*x.shape[:-1], -1)
        return out if residual is None else residual + out

    return forward


def _try_feed_forward(module: Any, forward: Forward) -> str:
    weight = module.gate_proj.weight  # PEFT's layers have it too
    with _random_adapters(module):
        return _difference(module.forward, forward, {"x": _random(weight, NUM_TOKENS, weight.shape[1])})


# --- rotary positions ----------------------------------------------------------------------------------------------


_rotate = rotating(fused.rotate)


def _attention(module: nn.Module) -> Forward | None:
    return attention_with(module, _rotate)


def _try_rotation(module: Any, _: Forward) -> str:
    weight = next(module.parameters())
    size = int(getattr(module, "head_dim", 0))
    q, k = (_random(weight, 1, NUM_TOKENS, heads, size).transpose(1, 2) for heads in (4, 2))
    cos, sin = (_random(weight, 1, NUM_TOKENS, size, seed=seed) for seed in (1, 2))

    def joined(rotate: Forward) -> Forward:
        return lambda q, k: torch.cat([part.transpose(1, 2) for part in rotate(q, k, cos, sin)], dim=2)

    return _difference(joined(modeling_llama.apply_rotary_pos_emb), joined(_rotate), {"q": q, "k": k})


# --- LoRA ----------------------------------------------------------------------------------------------------------


def _lora(module: nn.Module) -> Forward | None:
    layer: Any = module
    if not can_be_fused_lora(layer):
        return None
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dropout = layer.lora_dropout["default"]
        is_plain = not uses_default_adapter(layer) or args or kwargs
        known = isinstance(dropout, (nn.Identity, fused.MaskedDropout)) or not dropout.training
        if is_plain or not known or x.dtype != base.weight.dtype:
            return plain(x, *args, **kwargs)
        draw = dropout.draw(x) if isinstance(dropout, fused.MaskedDropout) else None
        return fused.lora(x, base.weight, base.bias, a.weight, b.weight, layer.scaling["default"], draw)

    return forward


def _try_lora(module: Any, forward: Forward) -> str:
    """Gradients of both matrices too."""
    parameters = module.lora_A["default"].weight, module.lora_B["default"].weight
    x = _random(module.base_layer.weight, NUM_TOKENS, module.base_layer.in_features)
    with _random_adapters(module):
        return _difference(module.forward, forward, {"x": x}, parameters)


@contextmanager
def _random_adapters(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and other values of LoRA's B than the start's zeros."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LoraLinear)]
    weights = [b.weight for layer in layers for b in layer.lora_B.values()]
    saved, modes = [weight.detach().clone() for weight in weights], [(m, m.training) for m in module.modules()]
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


# --- attention -----------------------------------------------------------------------------------------------------

_WINDOWS: Final[tuple[tuple[Any, Callable[[Any], int | None]], ...]] = (
    (modeling_llama.LlamaAttention, lambda module: None),
    (modeling_mistral.MistralAttention, lambda module: getattr(module.config, "sliding_window", None)),
    (modeling_qwen2.Qwen2Attention, lambda module: module.sliding_window),
)
"""Attentions that :func:`_joint_attention` knows, and their sliding windows."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a pass that are applied behind the projections (:class:`fedsim.attention.forward.Rotation`).

    Attributes:
        cos: ``[1 or batch, length, head size]``.
        sin: likewise.
    """

    cos: Tensor
    sin: Tensor

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[batch, heads, length, head size]``, rotated."""
        return fused.rotate(query, key, self.cos, self.sin)

    def rotated_into(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor
    ) -> Tensor:
        """Rotated queries of one token a row; its rotated key, and its value, go into a cache.

        Arguments as of :func:`fedsim.fused.ops.rotate_into`.
        """
        cos, sin = (part.flatten(0, 1) for part in (self.cos, self.sin))
        out: Tensor = OPS.rotate_into(query, key, value, cos, sin, keys, values, places)
        return out


def _joint_attention(module: nn.Module) -> Forward | None:
    """Queries, keys and values as one product where there are no gradients; else the forward pass that is there."""
    attention: Any = module
    own = getattr(type(module), "forward", None)
    window = next((window for kind, window in _WINDOWS if same_function(own, kind.forward)), None)
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
            return plain(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]
        parts = joint(hidden_states.flatten(0, -2)).split(joint.sizes, dim=-1)
        heads = [part.view(*shape, -1, size).transpose(1, 2) for part in parts]  # [batch, heads, length, size]
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
    """Without gradients; rotation into a cache is tried with the other kernels (:mod:`.ops`)."""
    weight = module.q_proj.weight
    cos, sin = (_random(weight, 1, NUM_TOKENS, module.head_dim, seed=seed) for seed in (1, 2))
    inputs = {"hidden_states": _random(weight, 1, NUM_TOKENS, weight.shape[1])}

    def of(function: Forward) -> Forward:
        return lambda hidden_states: function(hidden_states, (cos, sin), None)[0]

    return _joint_difference(module, of(module.forward), of(forward), inputs)


def _try_joint_feed_forward(module: Any, forward: Forward) -> str:
    weight = module.gate_proj.weight
    x, residual = (_random(weight, 1, NUM_TOKENS, weight.shape[1], seed=seed) for seed in (0, 1))

    def of(function: Forward) -> Forward:
        return lambda x: torch.cat([function(x), function(x, residual)])

    return _joint_difference(module, of(module.forward), of(forward), {"x": x})


def _joint_difference(module: nn.Module, plain: Forward, other: Forward, inputs: Mapping[str, Tensor]) -> str:
    """:func:`_difference` of values, between the layers one by one and their joint product."""
    with _random_adapters(module), torch.no_grad():
        wanted = {"out": plain(**inputs)}
        with hold_adapters(module):
            return _difference(lambda **_: wanted["out"], other, inputs)


# --- decoder layers ------------------------------------------------------------------------------------------------


def _layer(module: nn.Module) -> Forward | None:
    """Llama's decoder layer, whose norms are fused already."""
    if not is_llamas(module, "LlamaDecoderLayer"):
        return None
    layer: Any = module
    norms = layer.input_layernorm, layer.post_attention_layernorm
    if not all("forward" in vars(norm) and _norm(norm) is not None for norm in norms):
        return None
    takes_residual = _is_gated(layer.mlp) and "forward" in vars(layer.mlp)
    return decoder_layer_with(module, fused.add_norm, feed_takes_residual=takes_residual)


def _try_layer(module: Any, forward: Forward) -> str:
    """With a stand-in of its attention, which is tried apart."""
    attention = module.self_attn
    own = vars(attention).get("forward")
    attention.forward = lambda hidden_states, **_: (hidden_states.roll(1, -1), None)
    try:
        x = _random(module.input_layernorm.weight, NUM_TOKENS, len(module.input_layernorm.weight))[None]
        with _random_adapters(module):
            return _difference(module.forward, forward, {"hidden_states": x})
    finally:
        del attention.forward
        if own is not None:
            attention.forward = own


# --- trials --------------------------------------------------------------------------------------------------------


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    """Normal draws on the device and in the dtype of ``like``, from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _difference(
    plain: Forward, other: Forward, inputs: Mapping[str, Tensor], parameters: tuple[Tensor, ...] = ()
) -> str:
    """What is wrong with ``other``: value or gradients differ by more than rounding; empty if nothing is.

    Under :func:`torch.no_grad` only values are compared.
    """
    want, got = (list(_results(function, inputs, parameters)) for function in (plain, other))
    for wanted, found in zip(want, got, strict=True):
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            return "gives another shape or type"
        dtype = next(iter(inputs.values())).dtype
        distance = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        if not distance <= LIMITS.get(dtype, 0.0):  # NaN too
            return "computes something else"
    return ""


def _results(function: Forward, inputs: Mapping[str, Tensor], parameters: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The value, and the gradients of its product with fixed numbers; no parameter's own gradient is touched."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    yield out.detach()
    if torch.is_grad_enabled():
        yield from torch.autograd.grad(out, [*leaves.values(), *parameters], _random(out, *out.shape, seed=3))


@dataclass(frozen=True)
class _Kind:
    """A kind of layer.

    Attributes:
        name: for the log, in the plural.
        make: the fused forward pass of a module; None if the module is no such layer.
        trial: compares it with the module's own; what is wrong, or nothing.
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
