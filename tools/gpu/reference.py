"""Plain reference of a model: fp32, transformers' own eager attention, one row at a time, no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedsim.config.lora import LoraSettings
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import Slot
from fedsim.model.load import attach_lora
from fedsim.train.objectives import Preference
from tools.bench.gradients import of_loss
from tools.bench.plain_loop import PeerModel


class Reference(PeerModel):
    """A Hugging Face model with PEFT's LoRA, whose weights are those of the model under test.

    Args:
        base: frozen, with transformers' "eager" attention, in the dtype of the model under test; it is made fp32 here,
            so that both have the same numbers.
        slots: the flat adapter's.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraSettings, slots: Sequence[Slot]) -> None:
        assert base.config._attn_implementation == "eager", "the reference attends by transformers' definition"
        self.device = base.device
        self.model: PeftModel = attach_lora(base, lora).float().eval()
        self.slots = tuple(slots)

    def load(self, vector: torch.Tensor) -> None:
        """Give the adapter the values of a flat vector, wherever that is."""
        super().load(vector.to(self.device))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """``[tokens, vocabulary]`` of one row."""
        row = torch.tensor([list(ids)], device=self.device)
        logits: torch.Tensor = self.model(input_ids=row, use_cache=False).logits[0]
        return logits

    def sft_loss(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """Mean negative log-likelihood of the rows' targets."""
        total = torch.stack([self._logprob(row) for row in rows]).sum()
        return -total / sum(row.num_targets for row in rows)

    def dpo_loss(
        self, pairs: Sequence[Preference], start: torch.Tensor, policy: torch.Tensor, beta: float
    ) -> torch.Tensor:
        """DPO's sigmoid loss of the adapter ``policy`` beside the adapter ``start``, mean over the pairs."""
        both = [(pair.chosen, pair.rejected) for pair in pairs]
        self.load(start)
        with torch.no_grad():
            before = [self._logprob(chosen) - self._logprob(rejected) for chosen, rejected in both]
        self.load(policy)
        now = [self._logprob(chosen) - self._logprob(rejected) for chosen, rejected in both]
        margins = beta * (torch.stack(now) - torch.stack(before))
        return -F.logsigmoid(margins).mean()

    def gradient(self, loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        """A loss, and its gradient in the flat vector's order."""
        kept: list[float] = []

        def noted(_: PeerModel) -> torch.Tensor:
            value = loss()
            kept.append(float(value.detach()))
            return value

        grad = of_loss(self, noted)
        return kept[0], grad

    def _logprob(self, row: TokenRow) -> torch.Tensor:
        """Σ log p of the row's targets."""
        logprobs = self.logits(row.input_ids.tolist())[:-1].log_softmax(dim=-1)
        targets = torch.from_numpy(row.input_ids[1:]).long().to(self.device)
        counts = torch.from_numpy(row.loss_mask[1:]).to(self.device)
        return logprobs.gather(1, targets[:, None])[:, 0][counts].sum()
