"""Target log-probabilities equal a plain forward pass and log-softmax, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.config.lora import LoraSettings
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, attach_lora
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


SIZES: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
HEADS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(vocab_size=261, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=256, word_embed_proj_dim=32, init_std=0.2, dropout=0.0),
    "neox": GPTNeoXConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, sliding_window=None),
    "deepseek": DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
                                 n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
                                 q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    "gemma4": Gemma4TextConfig(**SIZES, head_dim=8, global_head_dim=16, vocab_size_per_layer_input=261,
                               hidden_size_per_layer_input=8, num_kv_shared_layers=0, sliding_window=6,
                               layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}  # fmt: skip
IN_FP32 = ("mixtral", "deepseek")  # experts have no product in fp64


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_in_chunks_is_the_architectures_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models call their bodies in many ways and want more of them than hidden states: values and gradients."""
    torch.manual_seed(0)
    config = copy.deepcopy(HEADS[kind])
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    head = base.get_output_embeddings().requires_grad_(True)
    target = "query_key_value" if kind == "neox" else "o_proj" if kind == "deepseek" else "q_proj"
    model = attach_lora(base, LoraSettings(4, 8.0, 0.0, (target,)))
    if kind not in IN_FP32:
        model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data.normal_(std=0.2)
    batch = collate([ROWS[0], ROWS[2], ROWS[5]], CPU)

    def run() -> list[torch.Tensor]:
        values = target_logprobs(model, batch)
        return [values, *torch.autograd.grad((values * torch.arange(len(values))).sum(), parameters)]

    whole = run()
    calls: list[int] = []
    head.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[1]))
    monkeypatch.setattr("fedsim.model.logprobs.MAX_LOGITS", 261 * 5)
    limit = 1e-5 if kind in IN_FP32 else 1e-6 if kind == "gemma4" else 1e-12
    for found, wanted in zip(run(), whole, strict=True):
        assert float((found - wanted).norm()) <= limit * float(wanted.norm()) and float(wanted.norm()) > 0
    assert max(calls) == 5 and sum(calls) == 2 * len(whole[0])
