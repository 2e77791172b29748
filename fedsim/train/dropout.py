"""Dropout with draws keyed by micro-batch: the same for any grouping into forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fedsim.attention.spans import to_device
from fedsim.base.errors import ModelError
from fedsim.fused.functions import DropoutMask, MaskedDropout, dropped
from fedsim.fused.ops import OPS, runs_fused
from fedsim.model.logprobs import head_start


@dataclass(frozen=True)
class Part:
    """A micro-batch of a pass.

    Attributes:
        seed: of its draws.
        num_tokens: tokens that go through the decoder.
        num_targets: tokens before targets, which go through the LM head.
    """

    seed: int
    num_tokens: int
    num_targets: int


class KeyedDropout:
    """Draws of the present pass, shared by all LoRA layers of a model.

    The layers draw one after the other, and each micro-batch has a seed of its own: on CUDA with
    Triton the key of a counter-based generator, elsewhere a generator's seed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[tuple[torch.Generator, Part]] = []
        self._of_head: Masked | None = None  # the LM head's draws, made once a pass
        # Fused: seed and place of the decoder's and of the head's tokens, int64 [2, tokens].
        self._counters = self._counters_of_head = torch.zeros(2, 0, dtype=torch.int64)
        self._num_draws = 0  # decoder layers that have drawn in this pass

    @classmethod
    def install(cls, model: PreTrainedModel) -> KeyedDropout | None:
        """Replace the dropout of a model's LoRA layers; idempotent.

        Returns:
            The draws that the layers share; None if no layer has dropout.

        Raises:
            ModelError: a layer sees only some of the tokens, for which nothing can be drawn.
        """
        # Share the draws of layers that were replaced before.
        for module in model.modules():
            if isinstance(module, LoraDropout):
                return module.draws
        found: KeyedDropout | None = None
        draws = cls(next(model.parameters()).device)
        head = model.get_output_embeddings()
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for name, old in layer.lora_dropout.items():
                if not isinstance(old, nn.Dropout) or old.p == 0:
                    continue
                if "experts" in path.split("."):
                    why = "is an expert, which sees only the tokens that are routed to it"
                    raise _refused(path, why)
                new = LoraDropout(old.p, draws, path, sees_targets=layer is head)
                layer.lora_dropout[name] = new.train(old.training)
                found = draws
        return found

    def begin(self, parts: Iterable[Part]) -> None:
        """Begin a pass of these micro-batches, in the order in which they are packed."""
        self._parts = []
        for part in parts:
            self._parts.append((torch.Generator(self.device).manual_seed(part.seed), part))
        self._of_head, self._num_draws = None, 0
        if runs_fused(self.device):
            seeds = np.array([part.seed for _, part in self._parts], dtype=np.int64)
            of_decoder = counters(seeds, [part.num_tokens for _, part in self._parts])
            of_head = counters(seeds, [part.num_targets for _, part in self._parts])
            self._counters = to_device(torch.from_numpy(of_decoder), self.device)
            self._counters_of_head = to_device(torch.from_numpy(of_head), self.device)

    def draw(self, num_tokens: int, width: int, p: float) -> DropoutMask | None:
        """Draw a decoder layer's mask; each number is kept with probability 1 − p.

        Args:
            num_tokens: tokens that the layer sees, in the pass's order.
            width: numbers of a token's vector.
            p: share that is dropped.

        Returns:
            None if the pass has other tokens.
        """
        counts = [part.num_tokens for _, part in self._parts]
        if num_tokens != sum(counts):
            return None
        if runs_fused(self.device):  # the kernel computes the mask from the counters
            self._num_draws += 1
            return Counted(self._counters, self._num_draws, p)
        return self._masked(width, counts, p)

    def draw_of_head(self, num_tokens: int, width: int, p: float) -> DropoutMask | None:
        """Draw the mask of the LM head for tokens before targets, from :func:`head_start` on.

        The mask is drawn once a pass, so that a chunk that is computed again has the same draws.
        """
        counts = [part.num_targets for _, part in self._parts]
        start = head_start()
        chunk = slice(start, start + num_tokens)  # of the pass's tokens before targets
        if chunk.stop > sum(counts):
            return None
        if runs_fused(self.device):
            return Counted(self._counters_of_head[:, chunk], 0, p)
        if self._of_head is None:
            self._of_head = self._masked(width, counts, p)
        return Masked(self._of_head.kept[chunk], p)

    def _masked(self, width: int, counts: list[int], p: float) -> Masked:
        """Draw a mask for ``counts`` tokens of each micro-batch, from its own generator."""
        # Each micro-batch's rows of the mask come from its own generator: bool [tokens, width].
        kept = torch.empty(sum(counts), width, dtype=torch.bool, device=self.device)
        for (generator, _), rows in zip(self._parts, kept.split(counts), strict=True):
            rows.bernoulli_(1 - p, generator=generator)
        return Masked(kept, p)


def counters(seeds: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return the seed of each token's micro-batch, and its place in it, int64 ``[2, tokens]``.

    Args:
        seeds: int64, one a micro-batch.
        counts: tokens of each.
    """
    places = [np.arange(count, dtype=np.int64) for count in counts]
    return np.stack([np.repeat(seeds, counts), np.concatenate([np.empty(0, np.int64), *places])])


@dataclass(frozen=True, eq=False)
class Masked:
    """Draws stored as a mask.

    Attributes:
        kept: bool ``[tokens, width]``, True with probability 1 − p.
        p: share that is dropped.
    """

    kept: torch.Tensor
    p: float

    def apply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`fedsim.fused.functions.DropoutMask`."""
        dropped = (x * self.kept).mul_(1 / (1 - self.p))
        return dropped if added is None else dropped.add_(added)


@dataclass(frozen=True, eq=False)
class Counted:
    """Draws as a function of seed, token, column and layer, recomputed and not stored.

    Attributes:
        counters: of the tokens, on the device (:func:`counters`).
        number: of the decoder layer in the pass, from 1 on; 0 is the LM head.
        p: share that is dropped.
    """

    counters: torch.Tensor
    number: int
    p: float

    def apply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`fedsim.fused.functions.DropoutMask`."""
        seeds, places = self.counters
        out: torch.Tensor = OPS.drop(x, seeds, places, self.number, self.p, added)
        return out


class LoraDropout(MaskedDropout):
    """Inverted dropout (Srivastava et al. 2014) with keyed draws; the identity in evaluation mode.

    Args:
        p: share that is dropped.
        draws: of the pass.
        path: names the layer in an error.
        sees_targets: whether it is the LM head's.
    """

    def __init__(
        self,
        p: float,
        draws: KeyedDropout,
        path: str = "",
        *,
        sees_targets: bool = False,
    ) -> None:
        super().__init__()
        self.p = p
        self.draws = draws
        self.path = path
        self.sees_targets = sees_targets

    def draw(self, x: torch.Tensor) -> DropoutMask | None:
        """Draw the layer's mask for ``x``, one vector a token; None in evaluation mode.

        Args:
            x: ``[…, width]``.

        Raises:
            ModelError: ``x`` has other tokens than the pass.
        """
        if not self.training:
            return None
        num_tokens, width = x.shape[:-1].numel(), x.shape[-1]
        if self.sees_targets:
            found = self.draws.draw_of_head(num_tokens, width, self.p)
        else:
            found = self.draws.draw(num_tokens, width, self.p)
        if found is None:
            raise _refused(self.path, "sees other tokens than the batch has")
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share of p, scale the rest by 1 / (1 − p); errors as of :meth:`draw`."""
        draw = self.draw(x)
        return x if draw is None else dropped(x, draw)


def _refused(path: str, why: str) -> ModelError:
    target = path.rpartition(".")[2]
    return ModelError(
        f"lora_targets: {target!r}: the layer {path} {why}, and dropout cannot be drawn for it; "
        f"leave {target!r} out of lora_targets, or set lora_dropout=0"
    )
