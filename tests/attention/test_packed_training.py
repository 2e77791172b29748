"""Packed rows in training: Hugging Face's own padded pass is the oracle, in fp64, at lengths that share no factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.model.logprobs import target_logprobs

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
LENGTHS = (1, 2, 3, 17, 31, 64)
PAD = 260


def row(length: int, seed: int = 0) -> TokenRow:
    rng = np.random.default_rng([seed, length])
    return TokenRow(rng.integers(0, 250, length).astype(np.int32), np.arange(length) >= length // 3)


def wide(made: tuple[LoadedModel, FlatAdapter], attention: str) -> Any:
    loaded, _ = made
    loaded.model.double()
    loaded.base.set_attn_implementation(attention)
    return loaded.base


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def padded_logprobs(model: Any, rows: list[TokenRow], side: str) -> torch.Tensor:
    """Of every target, by transformers' own SDPA attention over padded rows and an attention mask."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    places = [slice(0, len(r)) if side == "right" else slice(length - len(r), length) for r in rows]
    for i, (r, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = torch.from_numpy(r.input_ids).long(), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    parts = []
    for i, (r, place) in enumerate(zip(rows, places, strict=True)):
        scores = logits[i, place][:-1].log_softmax(-1).gather(1, ids[i, place][1:, None])[:, 0]
        parts.append(scores[torch.from_numpy(r.loss_mask[1:])])
    return torch.cat(parts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_equals_padded(make_adapted: Make, attention: str, side: str) -> None:
    """Log-probabilities, loss and the gradient of every LoRA tensor."""
    own = wide(make_adapted(std=0.2, targets=TARGETS), IMPLEMENTATIONS[attention])
    theirs = wide(make_adapted(std=0.2, targets=TARGETS), "sdpa")
    rows = [row(n) for n in (31, 2, 64, 1, 17, 3)]
    found, wanted = target_logprobs(own, collate(rows, torch.device("cpu"))), padded_logprobs(theirs, rows, side)
    assert found.dtype == torch.float64 and float((found - wanted).detach().abs().max()) < 1e-11
    weights = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    ours, oracle = gradients(own, (found * weights).sum()), gradients(theirs, (wanted * weights).sum())
    assert len(ours) == 2 * 2 * len(TARGETS)
    for name, want in oracle.items():
        assert float(want.norm()) > 0 and float((ours[name] - want).norm() / want.norm()) < 1e-9, name


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_rows_do_not_see_each_other(make_adapted: Make, changed: int) -> None:
    """Another row in one's place: the others' log-probabilities, and their part of every gradient, stay."""
    model = wide(make_adapted(std=0.2, targets=TARGETS), IMPLEMENTATIONS["sdpa"])

    def others(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        rows = [row(n, seed if i == changed else 0) for i, n in enumerate(LENGTHS)]
        batch = collate(rows, torch.device("cpu"))
        values = target_logprobs(model, batch)
        kept = values[batch.target_rows != changed]
        return kept.detach(), gradients(model, kept.sum()), values[batch.target_rows == changed].detach()

    (found, grads, mine), (wanted, wanted_grads, before) = others(1), others(0)
    assert len(mine) == 0 or not torch.equal(mine, before), "the row has changed"
    assert float((found - wanted).abs().max()) < 1e-12
    for name, want in wanted_grads.items():
        assert float((grads[name] - want).norm() / want.norm()) < 1e-12, name
