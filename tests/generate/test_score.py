"""Scores equal a plain forward pass and log-softmax, row by row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.data.chat import TokenRow
from fedsim.generate.score import score_unit


def rows(num: int, seed: int = 0) -> list[TokenRow]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, num)
    return [TokenRow(rng.integers(0, 250, n).astype(np.int32), rng.random(n) < 0.4) for n in lengths]


def plain(model: LlamaForCausalLM, row: TokenRow) -> float:
    ids = torch.from_numpy(row.input_ids.astype(np.int64))
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
    return float(scores.gather(1, ids[1:, None])[torch.from_numpy(row.loss_mask[1:]), 0].sum())


@pytest.mark.parametrize("size", [1, 3, 12])
def test_equals_a_plain_forward(make_llama: Callable[..., LlamaForCausalLM], size: int) -> None:
    model, asked = make_llama(), rows(12)
    got = [value for i in range(0, 12, size) for value in score_unit(model, asked[i : i + size])]
    assert got == pytest.approx([plain(model, row) for row in asked], rel=1e-5, abs=1e-5)


def test_rows_without_targets_score_zero(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    empty = [TokenRow(np.arange(5, dtype=np.int32), np.zeros(5, dtype=bool))]
    assert score_unit(make_llama(), empty) == [0.0]
    both = score_unit(make_llama(), [*empty, *rows(1)])
    assert both[0] == 0.0 and both[1] != 0.0
