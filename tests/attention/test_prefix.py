"""Candidate logits behind a shared head equal a plain forward pass over the whole prompt."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.attention.prefix import candidate_logits, common_length, read_head

CANDIDATES = [7, 90, 3]
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.4, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def tiny_llama(attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    """A random grouped-query Llama whose logits differ clearly between tokens and positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        attn_implementation=IMPLEMENTATIONS[attention],
    )
    return LlamaForCausalLM(config).eval()


def with_lora(model: PreTrainedModel, targets: list[str]) -> torch.nn.Module:
    """The model with an adapter that changes its output."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    return wrapped.eval()


def ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, 97, length).astype(np.int32)


def plain(model: torch.nn.Module, prompt: np.ndarray) -> torch.Tensor:
    """Candidate logits by one unpadded forward pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None], use_cache=False).logits
    return logits[0, -1, CANDIDATES]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize(("head_length", "lengths"), [(17, [5, 1, 11, 7]), (0, [3, 9, 1]), (31, [4, 4]), (13, [1, 1])])
def test_equals_the_whole_prompt_forward(
    attention: str, targets: list[str] | None, head_length: int, lengths: list[int]
) -> None:
    rng = np.random.default_rng(head_length)
    model: torch.nn.Module = tiny_llama(attention)
    model = with_lora(model, targets) if targets else model
    head, tails = ids(rng, head_length), [ids(rng, n) for n in lengths]
    got = candidate_logits(model, read_head(model, head), tails, CANDIDATES)
    want = torch.stack([plain(model, np.concatenate([head, tail])) for tail in tails])
    assert got.dtype == torch.float32 and got.shape == (len(tails), 3)
    assert want.std() > 0.1, "the oracle must be able to tell rows apart"
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_adapter_is_applied_in_head_and_tail() -> None:
    rng = np.random.default_rng(5)
    head, tail = ids(rng, 8), ids(rng, 5)
    wrapped = with_lora(tiny_llama(), ["q_proj", "v_proj"])
    adapted = candidate_logits(wrapped, read_head(wrapped, head), [tail], CANDIDATES)
    base = tiny_llama()
    bare = candidate_logits(base, read_head(base, head), [tail], CANDIDATES)
    assert (adapted - bare).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]])
@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SIZES, logits_scaling=8.0),
        CohereConfig(**SIZES, logit_scale=0.0625),
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_the_architectures_own_scale_of_logits(config: PretrainedConfig, targets: list[str] | None) -> None:
    """Probabilities would be too sure by far without it."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    base = AutoModelForCausalLM.from_config(config).eval()
    model = (with_lora(base, targets) if targets else base).double()
    rng = np.random.default_rng(0)
    head, tails = ids(rng, 9), [ids(rng, n) for n in (5, 1, 7)]
    got = candidate_logits(model, read_head(model, head), tails, CANDIDATES)
    want = torch.stack([plain(model, np.concatenate([head, tail])) for tail in tails])
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_a_bfloat16_models_logits_are_not_rounded_to_bfloat16() -> None:
    """A plain head's rows are multiplied in fp32; only the candidates' ones."""
    rng = np.random.default_rng(3)
    model = tiny_llama().bfloat16()
    whole_head: list[torch.Size] = []
    head, tails = read_head(model, ids(rng, 9)), [ids(rng, 5), ids(rng, 2)]
    model.lm_head.register_forward_hook(lambda module, args, out: whole_head.append(out.shape))
    got = candidate_logits(model, head, tails, CANDIDATES)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    assert whole_head == [torch.Size([1, 2, 3])]
    assert "forward" not in vars(model.lm_head)


def test_head_is_reused_without_being_changed() -> None:
    rng = np.random.default_rng(6)
    model = tiny_llama()
    head = read_head(model, ids(rng, 9))
    before = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in head.kept.items()}
    unit, other = [ids(rng, n) for n in (3, 6)], [ids(rng, n) for n in (12, 1, 5)]
    first = candidate_logits(model, head, unit, CANDIDATES)
    candidate_logits(model, head, other, CANDIDATES)
    again = candidate_logits(model, head, unit, CANDIDATES)
    assert torch.equal(first, again), "a unit's result does not depend on the units before it"
    assert [place.layer for place in head.kept] == [0, 1, 2] and all(len(keys) == 9 for keys, _ in head.kept.values())
    for layer, (keys, values) in before.items():
        assert torch.equal(head.kept[layer][0], keys) and torch.equal(head.kept[layer][1], values)


def test_training_mode_is_refused() -> None:
    model = tiny_llama().train()
    with pytest.raises(AssertionError, match="eval mode"):
        read_head(model, np.array([1, 2], dtype=np.int32))


@pytest.mark.parametrize(
    ("prompts", "want"),
    [
        ([[1, 2, 3, 4], [1, 2, 9, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # a tail of one token stays
        ([[1, 2], [1, 2, 3, 4]], 1),
        ([[5, 2], [1, 2]], 0),
        ([[4]], 0),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 4, 5]], 2),
    ],
)
def test_common_length(prompts: list[list[int]], want: int) -> None:
    assert common_length([np.array(p, dtype=np.int32) for p in prompts]) == want
