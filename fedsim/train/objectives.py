"""Objectives of a step: SFT on replies, DPO on preference pairs.

An objective returns sums over its items; the loop divides by the whole batch's normaliser, so that
a batch gives one loss and one gradient however it is cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch.nn import functional as F

from fedsim.attention.spans import to_device
from fedsim.data.batch import collate, num_inputs
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.logprobs import target_logprobs

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)


class Objective(Protocol[Item_contra]):
    """A loss over items."""

    stat_names: tuple[str, ...]
    uses_dropout: bool

    def normaliser(self, items: Sequence[Item_contra]) -> float:
        """Return the divisor of a batch's summed loss, independent of the items' order."""
        ...

    def num_tokens(self, item: Item_contra) -> int:
        """Count the tokens that an item puts through the model."""
        ...

    def num_inputs(self, items: Sequence[Item_contra]) -> int:
        """Count the tokens of one pass over items."""
        ...

    def num_targets(self, items: Sequence[Item_contra]) -> int:
        """Count those of them before a target: only they go through the LM head."""
        ...

    def sums(
        self,
        model: torch.nn.Module,
        items: Sequence[Item_contra],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss (fp32 scalar with gradient) and summed statistics (fp32
        ``[len(stat_names)]``).
        """
        ...


class SftObjective:
    """Weighted mean negative log-likelihood of the batch's target tokens.

    Σ w · (−log p) / Σ w with the weight w of each target's row. With weights of 1 it is the loss of
    TRL's SFTTrainer: every token counts the same. A row of weight 0 counts as if it were not in the
    batch.
    """

    stat_names: tuple[str, ...] = ()
    uses_dropout = True

    def normaliser(self, items: Sequence[TokenRow]) -> float:
        """Target tokens of the batch by weight; 1 where that is 0, for a loss of 0."""
        return math.fsum(r.weight * r.num_targets for r in items) or 1.0

    def num_tokens(self, item: TokenRow) -> int:
        """The row's length."""
        return len(item)

    def num_inputs(self, items: Sequence[TokenRow]) -> int:
        """Without each row's last token."""
        return sum(map(num_inputs, items))

    def num_targets(self, items: Sequence[TokenRow]) -> int:
        """Of all rows."""
        return sum(row.num_targets for row in items)

    def sums(
        self,
        model: torch.nn.Module,
        items: Sequence[TokenRow],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return −Σ w · log p(target), and no statistics."""
        batch = collate(items, next(model.parameters()).device)
        logprobs = target_logprobs(model, batch)  # [targets]
        if any(r.weight != 1 for r in items):  # w of each target's row
            weights = torch.tensor([r.weight for r in items], dtype=logprobs.dtype)
            logprobs = logprobs * to_device(weights, logprobs.device)[batch.target_rows]
        loss = -logprobs.sum()
        return loss, loss.new_zeros(0)


@dataclass(frozen=True, eq=False)
class Preference:
    """A prompt with the reply that is preferred and the one that is not."""

    chosen: TokenRow
    rejected: TokenRow


class DpoObjective:
    """DPO with the sigmoid loss (Rafailov et al. 2023, eq. 7).

    The reference is a frozen copy of the flat adapter.

    Args:
        adapter: the model's adapter; it holds the reference while reference log-probabilities are
            read.
        reference: fp32 ``[size]``.
        beta: strength of the pull towards the reference.
    """

    stat_names: tuple[str, ...] = (
        "reward_margin",
        "reward_accuracy",
        "chosen_reward",
        "rejected_reward",
    )
    uses_dropout = False  # as TRL does: dropout would blur the comparison with the reference

    def __init__(self, adapter: FlatAdapter, reference: torch.Tensor, beta: float) -> None:
        self.adapter = adapter
        self.reference = reference
        self.beta = beta

    def normaliser(self, items: Sequence[Preference]) -> int:
        """Pairs of the batch."""
        return max(1, len(items))

    def num_tokens(self, item: Preference) -> int:
        """Both rows, once for the policy and once for the reference."""
        return 2 * (len(item.chosen) + len(item.rejected))

    def num_inputs(self, items: Sequence[Preference]) -> int:
        """Of both rows, without their last tokens."""
        return sum(num_inputs(pair.chosen) + num_inputs(pair.rejected) for pair in items)

    def num_targets(self, items: Sequence[Preference]) -> int:
        """Of both rows."""
        return sum(pair.chosen.num_targets + pair.rejected.num_targets for pair in items)

    def sums(
        self,
        model: torch.nn.Module,
        items: Sequence[Preference],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return −Σ log σ(margin), and sums of margins, right preferences and rewards.

        margin = β[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)].
        """
        # All chosen rows, then all rejected ones.
        rows = [pair.chosen for pair in items] + [pair.rejected for pair in items]
        batch = collate(rows, next(model.parameters()).device)

        # log π_ref of each row, with the reference in the model: [2 · pairs].
        current = self.adapter.copy()
        self.adapter.load(self.reference)
        with torch.no_grad():
            reference = batch.row_sums(target_logprobs(model, batch))
        self.adapter.load(current)

        # Rewards β(log π − log π_ref), with gradients: [2 · pairs].
        rewards = self.beta * (batch.row_sums(target_logprobs(model, batch)) - reference)
        chosen, rejected = rewards.chunk(2)  # [pairs] each
        margin = chosen - rejected
        stats = torch.stack([margin.sum(), (margin > 0).sum(), chosen.sum(), rejected.sum()])
        return -F.logsigmoid(margin).sum(), stats.detach().float()
