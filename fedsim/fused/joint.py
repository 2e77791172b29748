"""Linear layers over one input as one product, without gradients, with LoRA matrices that are cast once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

ATTRIBUTE: Final = "joint_product"
"""Of a module whose layers are multiplied jointly."""


class JointLinear:
    """Frozen linear layers over one input, with or without LoRA, as one product.

    The layers' weights become views of one matrix ``[sum of outputs, inputs]``: values, names and state dicts stay, and
    no memory is added. LoRA's matrices are copied in the weights' dtype, all A below one another and all B in the
    blocks of one matrix; the copies keep their addresses, as CUDA graphs read them, and are valid while
    :func:`hold_adapters` holds them.

    Args:
        layers: all :func:`is_frozen_linear` or LoRA around such a layer; all with or all without bias.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: list[Any] = list(layers)
        bases = [base_of(layer) for layer in self._layers]
        self.sizes = [base.out_features for base in bases]
        self._weight = torch.cat([base.weight for base in bases])
        self._bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        for base, weight in zip(bases, self._weight.split(self.sizes), strict=True):
            base.weight.data = weight
        self._low: tuple[Tensor, Tensor] | None = None  # [all ranks, inputs] and [sum of outputs, all ranks]
        self._is_held = False

    def takes(self, x: Tensor) -> bool:
        """Return whether the product may be used: adapters are held; no gradient, no dropout, no other adapter."""
        return (
            self._is_held
            and not torch.is_grad_enabled()
            and x.dtype == self._weight.dtype
            and all(uses_default_adapter(layer) and not layer.training for layer in self._adapted())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs beside one another.

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
        """Copy the adapters' present values."""
        adapted = [(row, layer) for row, layer in zip(self._starts(), self._layers, strict=True) if _has_lora(layer)]
        if not all(uses_default_adapter(layer) for _, layer in adapted):
            return
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for _, layer in adapted]
        if adapted and self._low is None:
            num_ranks, outputs = sum(len(a) for a, _ in pairs), sum(self.sizes)
            self._low = (
                self._weight.new_empty(num_ranks, self._weight.shape[1]),
                self._weight.new_zeros(outputs, num_ranks),
            )
        begin = 0
        for (row, layer), (a, b) in zip(adapted, pairs, strict=True):
            assert self._low is not None
            low_a, low_b = self._low
            ranks = slice(begin, begin + len(a))
            torch.mul(a, layer.scaling["default"], out=low_a[ranks])
            low_b[row : row + len(b), ranks] = b
            begin = ranks.stop
        self._is_held = True

    def release(self) -> None:
        """Use the copies no longer."""
        self._is_held = False

    def _starts(self) -> list[int]:
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    def _adapted(self) -> list[Any]:
        return [layer for layer in self._layers if _has_lora(layer)]


@contextmanager
def hold_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model's joint products use the adapter's present values, which must not change inside the block."""
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
    """Which adapters the model's LoRA layers add at present, for comparison with another time."""
    layers: list[Any] = [module for module in model.modules() if _has_lora(module)]
    return frozenset((layer.disable_adapters, layer.merged, tuple(layer.active_adapters)) for layer in layers)


def can_be_joint(layers: Sequence[Any]) -> bool:
    """Return whether layers over one input can be a :class:`JointLinear`."""
    if not all(is_frozen_linear(base_of(layer)) for layer in layers):
        return False
    if not all(can_be_fused_lora(layer) for layer in layers if _has_lora(layer)):
        return False
    bases = [base_of(layer) for layer in layers]
    kinds = {(base.in_features, base.weight.dtype, base.weight.device, base.bias is None) for base in bases}
    return len(kinds) == 1


def base_of(layer: Any) -> Any:
    """The linear layer below an adapter, or the layer itself."""
    return layer.base_layer if _has_lora(layer) else layer


def is_frozen_linear(module: Any) -> bool:
    """Return whether a module is a plain linear layer whose weight and bias have no gradient."""
    bias = module.bias if type(module) is nn.Linear else None
    return type(module) is nn.Linear and not module.weight.requires_grad and (bias is None or not bias.requires_grad)


def can_be_fused_lora(layer: Any) -> bool:
    """Return whether a layer is LoRA's plain form: one adapter over a frozen linear layer, without DoRA and biases."""
    if not _has_lora(layer) or list(layer.lora_A) != ["default"] or layer.lora_variant:
        return False
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return is_frozen_linear(layer.base_layer) and a.bias is None and b.bias is None


def uses_default_adapter(layer: Any) -> bool:
    """Return whether a LoRA layer adds its one adapter at present, which is neither off nor merged into the weight."""
    return not layer.disable_adapters and not layer.merged and layer.active_adapters == ["default"]


def _has_lora(layer: Any) -> bool:
    return isinstance(layer, LoraLinear)
