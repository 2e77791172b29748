"""Dropout whose draws belong to micro-batches: the same whichever of them share a forward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class KeyedDropout:
    """The draws of the pass that is under way, shared by all LoRA layers of a model.

    Each micro-batch has a generator of its own, from which the layers draw one after the other.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Generator, int]] = []
        self._device = torch.device("cpu")

    @classmethod
    def install(cls, model: nn.Module) -> KeyedDropout | None:
        """Put it in place of the dropout of a model's LoRA layers; None if they have none."""
        dropout = cls()
        found = False
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            for name, old in layer.lora_dropout.items():
                if isinstance(old, nn.Dropout | LoraDropout) and old.p > 0:
                    layer.lora_dropout[name] = LoraDropout(old.p, dropout).train(old.training)
                    found = True
        dropout._device = next(model.parameters()).device
        return dropout if found else None

    def begin(self, parts: Iterable[tuple[int, int]]) -> None:
        """A pass begins.

        Args:
            parts: seed and number of tokens of each micro-batch, in the order in which they are packed.
        """
        self._parts = [(torch.Generator(self._device).manual_seed(seed), num_tokens) for seed, num_tokens in parts]

    def kept(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """bool, shaped as ``x`` (``[1, tokens, width]``): what is not dropped; True with probability 1 − p."""
        assert x.shape[:2] == (1, sum(n for _, n in self._parts)), "the pass has other tokens than its draws are for"
        kept = torch.empty_like(x, dtype=torch.bool)
        for (generator, _), part in zip(self._parts, kept[0].split([n for _, n in self._parts]), strict=True):
            part.bernoulli_(1 - p, generator=generator)
        return kept


class LoraDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) with keyed draws; the identity in evaluation mode.

    Args:
        p: share that is dropped.
        draws: of the pass.
    """

    def __init__(self, p: float, draws: KeyedDropout) -> None:
        super().__init__()
        self.p = p
        self.draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share of p, scale the rest by 1 / (1 − p)."""
        return (x * self.draws.kept(x, self.p)).mul_(1 / (1 - self.p)) if self.training else x
