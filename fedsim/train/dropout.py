"""Dropout whose draws belong to micro-batches: the same whichever of them share a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fedsim.errors import ModelError
from fedsim.model.logprobs import head_start


@dataclass(frozen=True)
class Part:
    """A micro-batch of a pass.

    Attributes:
        seed: of its draws.
        num_tokens: that go through the decoder.
        num_targets: tokens before targets, which go through the LM head.
    """

    seed: int
    num_tokens: int
    num_targets: int


class KeyedDropout:
    """The draws of the pass that is under way, shared by all LoRA layers of a model.

    Each micro-batch has a generator of its own, from which the layers draw one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[tuple[torch.Generator, Part]] = []
        self._of_head: torch.Tensor | None = None

    @classmethod
    def install(cls, model: PreTrainedModel) -> KeyedDropout | None:
        """Put it in place of the dropout of a model's LoRA layers; one that is there already stays, and is shared.

        Returns:
            None if no layer drops anything.

        Raises:
            ModelError: a layer that sees only some tokens, which the draws are not made for.
        """
        found = next((m.draws for m in model.modules() if isinstance(m, LoraDropout)), None)
        if found is not None:
            return found
        draws = cls(next(model.parameters()).device)
        head = model.get_output_embeddings()
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for name, old in layer.lora_dropout.items():
                if not isinstance(old, nn.Dropout) or old.p == 0:
                    continue
                if "experts" in path.split("."):
                    raise _refused(path, "is an expert, which sees only the tokens that are routed to it")
                new = LoraDropout(old.p, draws, path, sees_targets=layer is head)
                layer.lora_dropout[name] = new.train(old.training)
                found = draws
        return found

    def begin(self, parts: Iterable[Part]) -> None:
        """A pass of these micro-batches begins, in the order in which they are packed."""
        self._parts = [(torch.Generator(self.device).manual_seed(part.seed), part) for part in parts]
        self._of_head = None

    def kept(self, x: torch.Tensor, p: float) -> torch.Tensor | None:
        """What a decoder layer keeps of the pass's tokens: bool, True with probability 1 − p.

        Args:
            x: ``[…, width]``, one vector a token, in the pass's order.

        Returns:
            Shaped as ``x``; None if it has other tokens.
        """
        if x.shape[:-1].numel() != sum(part.num_tokens for _, part in self._parts):
            return None
        return self._drawn(x, [part.num_tokens for _, part in self._parts], p).view(x.shape)

    def kept_of_head(self, x: torch.Tensor, p: float) -> torch.Tensor | None:
        """The same of the LM head and the tokens before targets, or of some of them from :func:`head_start` on.

        They are drawn once in a pass, so that a chunk that is computed again has the draws that it had.
        """
        counts = [part.num_targets for _, part in self._parts]
        start, number = head_start(), x.shape[:-1].numel()
        if start + number > sum(counts):
            return None
        if self._of_head is None:
            self._of_head = self._drawn(x, counts, p)
        return self._of_head[start : start + number].view(x.shape)

    def _drawn(self, x: torch.Tensor, counts: list[int], p: float) -> torch.Tensor:
        kept = torch.empty(sum(counts), x.shape[-1], dtype=torch.bool, device=x.device)
        for (generator, _), rows in zip(self._parts, kept.split(counts), strict=True):
            rows.bernoulli_(1 - p, generator=generator)
        return kept


class LoraDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) with keyed draws; the identity in evaluation mode.

    Args:
        p: share that is dropped.
        draws: of the pass.
        path: names the layer in an error.
        sees_targets: whether it is the LM head's.
    """

    def __init__(self, p: float, draws: KeyedDropout, path: str = "", *, sees_targets: bool = False) -> None:
        super().__init__()
        self.p = p
        self.draws = draws
        self.path = path
        self.sees_targets = sees_targets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share of p, scale the rest by 1 / (1 − p).

        Raises:
            ModelError: ``x`` has other tokens than the pass.
        """
        if not self.training:
            return x
        kept = (self.draws.kept_of_head if self.sees_targets else self.draws.kept)(x, self.p)
        if kept is None:
            raise _refused(self.path, "sees other tokens than the batch has")
        return (x * kept).mul_(1 / (1 - self.p))


def _refused(path: str, why: str) -> ModelError:
    target = path.rpartition(".")[2]
    return ModelError(
        f"lora_targets: {target!r}: the layer {path} {why}, and dropout cannot be drawn for it; leave {target!r} out "
        "of lora_targets, or set lora_dropout=0"
    )
