"""The peer that is always there: a padded loop of Hugging Face, PEFT and torch.optim, as one writes it by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch.nn import functional as F

from fedsim.config.lora import LoraSettings
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import Slot
from fedsim.model.load import attach_lora
from fedsim.train.objectives import Preference
from tools.bench.stage import PAPER_LORA, Bench

PAD = 0


class PeerModel:
    """A model for peers: transformers' own SDPA attention, LoRA as PEFT makes it, weights equal to fedsim's."""

    def __init__(self, bench: Bench, slots: Sequence[Slot], lora: LoraSettings = PAPER_LORA) -> None:
        self.model: PeftModel = attach_lora(bench.base("sdpa"), lora)
        self.slots: tuple[Slot, ...] = tuple(slots)
        self.device = bench.device

    def load(self, vector: torch.Tensor) -> None:
        """Give the adapter the values of a flat vector."""
        for slot in self.slots:
            self.model.get_parameter(slot.name).data.copy_(vector[slot.start : slot.stop].view(slot.shape))

    def vector(self) -> torch.Tensor:
        """The adapter's values in the flat vector's order."""
        return torch.cat([self.model.get_parameter(slot.name).detach().flatten() for slot in self.slots])

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters."""
        return [self.model.get_parameter(slot.name) for slot in self.slots]

    def checkpointing(self, on: bool) -> None:
        """Gradient checkpointing, with whatever the library's default kind is."""
        if on:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()


def padded(rows: Sequence[TokenRow], device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded ids, attention mask, and labels on replies alone."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        own = torch.from_numpy(row.input_ids).long()
        ids[i, : len(row)] = own
        mask[i, : len(row)] = 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.loss_mask), own, torch.tensor(-100))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def sft(
    peer: PeerModel, batches: Sequence[Sequence[TokenRow]], lr: float, mark: Callable[[], None]
) -> list[torch.Tensor]:
    """One AdamW step a batch on the model's own loss, clipped to norm 1; the losses, still on the device."""
    return _train(peer, batches, lr, mark, lambda rows: sft_loss(peer, rows))


def dpo(
    peer: PeerModel, batches: Sequence[Sequence[Preference]], lr: float, beta: float, mark: Callable[[], None]
) -> list[torch.Tensor]:
    """As :func:`sft`, with DPO's sigmoid loss; the reference is a copy of the adapter as it stands at the start."""
    reference = [p.data.clone() for p in peer.trainable()]

    return _train(peer, batches, lr, mark, lambda pairs: dpo_loss(peer, pairs, reference, beta))


def sft_loss(peer: PeerModel, rows: Sequence[TokenRow]) -> torch.Tensor:
    """The model's own loss: mean over the batch's target tokens."""
    loss: torch.Tensor = peer.model(**padded(rows, peer.device), use_cache=False).loss
    return loss


def dpo_loss(
    peer: PeerModel, pairs: Sequence[Preference], reference: Sequence[torch.Tensor], beta: float
) -> torch.Tensor:
    """DPO's sigmoid loss, mean over the pairs."""
    batch = padded([p.chosen for p in pairs] + [p.rejected for p in pairs], peer.device)
    current = [p.data for p in peer.trainable()]
    with torch.no_grad():
        _point(peer, reference)
        before = _row_logprobs(peer.model, batch)
        _point(peer, current)
    chosen, rejected = (beta * (_row_logprobs(peer.model, batch) - before)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def _train(
    peer: PeerModel,
    batches: Sequence[Sequence[object]],
    lr: float,
    mark: Callable[[], None],
    loss_of: Callable[..., torch.Tensor],
) -> list[torch.Tensor]:
    parameters = peer.trainable()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    peer.model.train()
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        mark()
    return losses


def _point(peer: PeerModel, values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(peer.trainable(), values, strict=True):
        parameter.data = value


def _row_logprobs(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probability of each row's reply."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    negative = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return -negative.sum(dim=1)
