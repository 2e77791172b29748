"""Target log-probabilities equal a plain forward pass and log-softmax, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.model.logprobs import target_logprobs

CPU = torch.device("cpu")


def row(length: int, targets: list[int], seed: int = 0) -> TokenRow:
    mask = np.zeros(length, dtype=bool)
    mask[targets] = True
    return TokenRow(np.random.default_rng([seed, length]).integers(0, 250, length).astype(np.int32), mask)


def plain(model: torch.nn.Module, one: TokenRow) -> torch.Tensor:
    """Log-probabilities of one row's targets, in fp64 from the logits on."""
    ids = torch.from_numpy(one.input_ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    every = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
    return every[torch.from_numpy(one.loss_mask[1:])]


ROWS = [row(12, [5, 6, 11]), row(7, [3]), row(20, [19]), row(1, [0]), row(9, []), row(15, list(range(15)))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("picked", [[0], [0, 1, 2], [0, 1, 2, 3, 4, 5], [2], [4, 1]])
def test_equals_a_plain_forward(make_llama: Callable[..., LlamaForCausalLM], attention: str, picked: list[int]) -> None:
    model = make_llama(attn_implementation=IMPLEMENTATIONS[attention])
    rows = [ROWS[i] for i in picked]
    batch = collate(rows, CPU)
    with torch.no_grad():
        got = target_logprobs(model, batch)
        want = torch.cat([plain(model, one) for one in rows])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_only_tokens_before_targets_reach_the_head(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        target_logprobs(model, collate([row(30, [25, 29]), row(28, [27])], CPU))
    assert seen == [torch.Size([1, 3, 32])]


def test_gradients_equal_a_plain_forward(make_adapted: Callable[..., tuple[LoadedModel, FlatAdapter]]) -> None:
    loaded, flat = make_adapted(std=0.1)
    rows = [ROWS[0], ROWS[2], ROWS[5]]
    target_logprobs(loaded.base, collate(rows, CPU)).sum().backward()
    got = flat.grad.clone()
    flat.grad.zero_()
    sum(plain(loaded.base, one).sum() for one in rows).backward()  # type: ignore[union-attr]
    assert float((got - flat.grad).norm() / flat.grad.norm()) < 1e-5


@pytest.mark.parametrize("rows", [[row(9, [])], [row(1, [0])], [row(4, []), row(1, [])]], ids=["9", "1", "4 and 1"])
def test_a_batch_without_targets_has_no_values_and_a_zero_gradient(
    make_adapted: Callable[..., tuple[LoadedModel, FlatAdapter]], rows: list[TokenRow]
) -> None:
    loaded, flat = make_adapted(std=0.1)
    got = target_logprobs(loaded.base, collate(rows, CPU))
    assert got.shape == (0,)
    got.sum().backward()
    assert not flat.grad.any()


def test_a_row_does_not_see_its_neighbours(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    with torch.no_grad():
        alone = target_logprobs(model, collate([ROWS[1]], CPU)).sum()
        for seed in (0, 1):
            beside = target_logprobs(model, collate([row(60, [59], seed), ROWS[1], row(5, [], seed)], CPU))[1]
            torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_of_the_head_change_nothing_but_memory(
    make_adapted: Callable[..., tuple[LoadedModel, FlatAdapter]], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """In fp64: values and gradients; of all logits, only a chunk's are ever there."""
    loaded, _ = make_adapted(std=0.1, targets=("q_proj", "v_proj", "down_proj"))
    loaded.model.double()
    batch = collate(ROWS, CPU)
    heads: list[int] = []
    kept: list[torch.Size] = []
    loaded.base.lm_head.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0].shape[-2]))

    def run() -> list[torch.Tensor]:
        heads.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            values = target_logprobs(loaded.base, batch)
        parameters = [p for p in loaded.model.parameters() if p.requires_grad]
        return [values, *torch.autograd.grad((values * torch.arange(len(values))).sum(), parameters)]

    whole = run()
    assert heads == [len(whole[0])] and any(shape[-1:] == (261,) for shape in kept)
    monkeypatch.setattr("fedsim.model.logprobs.MAX_LOGITS", 261 * chunk + 260)
    for found, wanted in zip(run(), whole, strict=True):
        assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm()) and float(wanted.norm()) > 0
    if chunk < len(whole[0]):
        assert max(heads) == chunk and sum(heads) == 2 * len(whole[0]), "once forward, once backward"
        assert not any(shape[-1:] == (261,) for shape in kept)
    assert "forward" not in vars(loaded.base.base_model)
