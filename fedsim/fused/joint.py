"""Linear layers over one input as one product, without gradients; LoRA matrices are cast once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

ATTRIBUTE: Final = "joint_product"
"""Attribute of a module for the :class:`JointLinear` of its layers."""


class JointLinear:
    """Frozen linear layers over one input, with or without LoRA, as one product.

    The layers' weights become views of one matrix ``[sum of outputs, inputs]``: values, names and
    state dicts stay, and no memory is added. LoRA's matrices are copied in the weights' dtype, all
    A below one another and all B in the blocks of one matrix; the copies keep their addresses, as
    CUDA graphs read them, and are valid while :func:`hold_adapters` holds them.

    Args:
        layers: all :func:`is_frozen_linear` or LoRA around such a layer; all with or all without
            bias.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: list[Any] = list(layers)
        # One matrix; each layer's weight becomes a view of it.
        bases = [base_of(layer) for layer in self._layers]
        self.sizes = [base.out_features for base in bases]
        self._weight = torch.cat([base.weight for base in bases])
        self._bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        for base, weight in zip(bases, self._weight.split(self.sizes), strict=True):
            base.weight.data = weight

        # LoRA's copies: A [all ranks, inputs] and B [sum of outputs, all ranks].
        self._low: tuple[Tensor, Tensor] | None = None
        self._is_held = False

    def takes(self, x: Tensor) -> bool:
        """Return whether the product may be used for ``x``.

        Adapters have to be held; there may be no gradient, no dropout and no other adapter.
        """
        if not self._is_held or torch.is_grad_enabled() or x.dtype != self._weight.dtype:
            return False
        return all(uses_default_adapter(layer) and not layer.training for layer in self._adapted())

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layers' outputs, beside one another.

        Args:
            x: ``[tokens, inputs]``.

        Returns:
            ``[tokens, sum of outputs]``.
        """
        out = F.linear(x, self._weight, self._bias)
        if self._low is None:
            return out
        low_a, low_b = self._low
        return out.addmm_(x @ low_a.T, low_b.T)

    def hold(self) -> None:
        """Copy the adapters' present values; do nothing if one of them is off or merged."""
        adapted = self._adapted()
        if not all(uses_default_adapter(layer) for layer in adapted):
            return

        # Memory, once: zeros outside the blocks of B stay.
        if adapted and self._low is None:
            num_ranks = sum(len(layer.lora_A["default"].weight) for layer in adapted)
            inputs = self._weight.shape[1]
            low_a = self._weight.new_empty(num_ranks, inputs)
            low_b = self._weight.new_zeros(sum(self.sizes), num_ranks)
            self._low = low_a, low_b

        # A below one another, scaled; B in the rows of its layer's outputs.
        row = rank = 0
        for layer, size in zip(self._layers, self.sizes, strict=True):
            if _has_lora(layer):
                assert self._low is not None
                low_a, low_b = self._low
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                ranks = slice(rank, rank + len(a))
                torch.mul(a, layer.scaling["default"], out=low_a[ranks])
                low_b[row : row + len(b), ranks] = b
                rank = ranks.stop
            row += size
        self._is_held = True

    def release(self) -> None:
        """Use the copies no longer."""
        self._is_held = False

    def _adapted(self) -> list[Any]:
        """The layers that have an adapter."""
        return [layer for layer in self._layers if _has_lora(layer)]


@contextmanager
def hold_adapters(model: nn.Module) -> Iterator[None]:
    """Use joint products with the adapter's present values, which must not change in the block."""
    joints = [vars(module)[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in vars(module)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for joint in joints:
                joint.hold()
        yield
    finally:
        for joint in joints:
            joint.release()


def adapters_in_use(model: nn.Module) -> Hashable:
    """Adapters that the model's LoRA layers add at present, for comparison with another time."""
    states = set()
    for module in model.modules():
        if isinstance(module, LoraLinear):
            names = tuple(module.active_adapters)
            states.add((module.disable_adapters, module.merged, names))
    return frozenset(states)


def can_be_joint(layers: Sequence[Any]) -> bool:
    """Return whether layers over one input can be a :class:`JointLinear`."""
    if not all(is_frozen_linear(base_of(layer)) for layer in layers):
        return False
    if not all(can_be_fused_lora(layer) for layer in layers if _has_lora(layer)):
        return False
    kinds = set()
    for layer in layers:
        base = base_of(layer)
        weight = base.weight
        kinds.add((base.in_features, weight.dtype, weight.device, base.bias is None))
    return len(kinds) == 1


def base_of(layer: Any) -> Any:
    """The linear layer below an adapter, or the layer itself."""
    return layer.base_layer if _has_lora(layer) else layer


def is_frozen_linear(module: Any) -> bool:
    """Return whether a module is a plain linear layer whose weight and bias have no gradient."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    return module.bias is None or not module.bias.requires_grad


def can_be_fused_lora(layer: Any) -> bool:
    """Return whether a layer is plain LoRA: one adapter without DoRA or bias, on a frozen layer."""
    if not _has_lora(layer) or list(layer.lora_A) != ["default"] or layer.lora_variant:
        return False
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return is_frozen_linear(layer.base_layer) and a.bias is None and b.bias is None


def uses_default_adapter(layer: Any) -> bool:
    """Return whether a LoRA layer adds its one adapter now: it is neither off nor merged."""
    if layer.disable_adapters or layer.merged:
        return False
    return bool(layer.active_adapters == ["default"])


def _has_lora(layer: Any) -> bool:
    return isinstance(layer, LoraLinear)
