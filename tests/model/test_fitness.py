"""Architectures that packed rows suit are taken, others are refused, and no dropout is left but LoRA's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from fedsim.attention import forward
from fedsim.attention.backends import Eager, Sdpa, Varlen
from fedsim.attention.choice import Choice
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.attention.kv_cache import Slots
from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.model.fitness import check_fitness, switch_dropout_off
from fedsim.model.load import load_model, try_fitness
from fedsim.model.shape import model_shape

CPU = torch.device("cpu")
ROWS = [[5, 7, 9, 11, 20, 31, 44, 7, 8], [50, 60, 70, 13]]
COMMON: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.1,
    "attention_dropout": 0.2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
FALCON_H1: dict[str, Any] = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip


def built(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As loading builds it."""
    torch.manual_seed(0)
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert isinstance(model, PreTrainedModel)
    return model


FIT: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "opt": lambda: OPTConfig(**OPT),
    "neox": lambda: GPTNeoXConfig(**COMMON),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=8, sliding_window=6, attn_logit_softcapping=None),
    "granite": lambda: GraniteConfig(**COMMON, logits_scaling=8.0, attention_multiplier=0.2),
    "cohere": lambda: CohereConfig(**COMMON, logit_scale=0.0625),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=3, sliding_window=6),
    "qwen2 moe": lambda: Qwen2MoeConfig(**COMMON, **EXPERTS),
    "phi moe without jitter": lambda: PhimoeConfig(**COMMON, num_local_experts=3, router_jitter_noise=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FIT)
def test_what_fits_is_taken_and_left_as_it_was(kind: str, dtype: torch.dtype) -> None:
    config = FIT[kind]()
    switch_dropout_off(config)
    model = built(config, dtype)
    before = torch.get_rng_state()
    check_fitness(model, ROWS)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert model.config._attn_implementation == IMPLEMENTATIONS["sdpa"]


UNFIT: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "attention and Mamba in each layer": (
        lambda: FalconH1Config(**COMMON, **FALCON_H1),
        "FalconH1ForCausalLM: carries state from token to token",
    ),
    "attention in chunks": (
        lambda: Llama4TextConfig(**COMMON, intermediate_size_mlp=48, head_dim=8, num_local_experts=2,
                                 attention_chunk_size=64, no_rope_layers=[1, 0]),
        "Llama4ForCausalLM: ",
    ),
    "a short window in the mask alone": (
        lambda: PhimoeConfig(**COMMON, num_local_experts=3, router_jitter_noise=0.0, sliding_window=6),
        "PhimoeForCausalLM: packed rows differ from each row by itself",
    ),
    "a long window in the mask alone": (
        lambda: PhimoeConfig(**COMMON, num_local_experts=3, router_jitter_noise=0.0, sliding_window=64),
        "PhimoeForCausalLM: sliding_window=64, but its layer 0 does not pass it on to its attention",
    ),
    "a window in the mask of some layers": (
        lambda: Qwen2MoeConfig(**COMMON, **EXPERTS, use_sliding_window=True, sliding_window=64,
                               layer_types=["full_attention", "sliding_attention"]),
        "Qwen2MoeForCausalLM: sliding_window=64, but its layer 1 does not pass it on to its attention",
    ),
    "dropout": (
        lambda: OPTConfig(**{**OPT, "attention_dropout": 0.0}),
        "OPTForCausalLM: computes something else, or at random, in training",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    config, words = UNFIT[kind]
    with pytest.raises(ModelError, match=f"{words}.*; use a decoder such as Llama") as caught:
        check_fitness(built(config()), ROWS)
    assert "\n" not in str(caught.value)


def test_a_window_as_long_as_the_context_is_none() -> None:
    config = PhimoeConfig(**COMMON, num_local_experts=3, router_jitter_noise=0.0, sliding_window=256)
    check_fitness(built(config), ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_carry_state_unmarked_are_seen(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Every layer asks for attention, so that counting layers sees nothing; the rows themselves do."""

    def smear(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        states = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": states.cumsum(dim=1)}

    model: Any = built(MistralConfig(**COMMON, sliding_window=None), dtype)
    model.model.layers[1].self_attn.register_forward_pre_hook(smear, with_kwargs=True)
    with pytest.raises(ModelError, match="packed rows differ from each row by itself"):
        check_fitness(model, ROWS)


def test_positions_of_the_models_own_are_seen(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Counted from the batch's first token, whatever is passed: the second row would stand too late."""
    model: Any = make_llama()

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length = (kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]).shape[1]
        return args, {**kwargs, "position_ids": torch.arange(length)[None] ** 2}  # squares: rotations are relative

    check_fitness(model, ROWS)
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.raises(ModelError, match="packed rows differ from each row by itself"):
        check_fitness(model, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_that_differs_is_seen(dtype: torch.dtype) -> None:
    """A layer that mixes a token with the one before it: packed rows are right, single cached tokens have none before.

    In its second layer, so that every number of the first one's keys and values is right.
    """

    def shift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        states, (_, sine) = kwargs["hidden_states"], kwargs["position_embeddings"]
        begins = (sine == 0).all(dim=-1)[..., None]  # a row's first token
        return args, {**kwargs, "hidden_states": states + states.roll(1, dims=1).masked_fill(begins, 0)}

    model: Any = built(MistralConfig(**COMMON, sliding_window=None), dtype)
    check_fitness(model, ROWS)
    model.model.layers[1].self_attn.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(ModelError, match="MistralForCausalLM: its decoding with a cache differs from its plain"):
        check_fitness(model, ROWS)


def test_scoring_behind_a_head_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer is narrowed there alone."""
    model: Any = built(MistralConfig(**COMMON, sliding_window=None))
    monkeypatch.setattr("fedsim.attention.prefix.Narrowed", lambda keep, layout: forward.Narrowed(keep * 0 + 1, layout))
    with pytest.raises(ModelError, match="its scoring behind a shared head differs from its plain forward pass"):
        check_fitness(model, ROWS)


def test_a_library_error_of_decoding_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch:\nvalue tensor of shape [13, 4, 8]")

    monkeypatch.setattr(Slots, "kept", broken)
    with pytest.raises(ModelError, match=r"cannot decode with a cache \(shape mismatch: value tensor.*; use a decoder"):
        check_fitness(built(MistralConfig(**COMMON)), ROWS)


def test_a_mask_of_the_models_own_is_seen() -> None:
    """Its scores are shifted by trained numbers, which are zero at first: no number of a new model would show it."""
    config = AutoConfig.for_model("doge", **COMMON)
    with pytest.raises(ModelError, match="DogeAttention: chooses by a mask of its own what a token sees"):
        check_fitness(built(config), ROWS)


def test_dropout_that_no_configuration_speaks_of_is_switched_off(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model: Any = make_llama()
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.5))
    check_fitness(model, ROWS)
    assert model.model.norm[1].p == 0


def test_every_dropout_of_a_configuration_is_named() -> None:
    config = OPTConfig(**OPT, layerdrop=0.3)
    assert switch_dropout_off(config) == {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.3}
    assert config.dropout == config.attention_dropout == config.layerdrop == 0
    assert switch_dropout_off(config) == {}


def test_random_routing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"router_jitter_noise=0\.01 in config\.json: the model draws its routes"):
        switch_dropout_off(PhimoeConfig(**COMMON))


@pytest.fixture()
def opt_dir(llama_dir: Path, tmp_path: Path) -> Path:
    """An OPT with dropout of its own, with the tokenizer of the Llama."""
    folder = tmp_path / "opt"
    shutil.copytree(llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    built(OPTConfig(**{**OPT, "vocab_size": 261})).save_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["dropout"] == 0.1
    return folder


def test_a_loaded_model_draws_nothing_but_loras_dropout(opt_dir: Path) -> None:
    """Two states of the global generator, one result; with LoRA's dropout, which has draws of its own here, two."""
    for dropout, wanted in ((0.0, True), (0.2, False)):
        lora = LoraSettings(2, 4.0, dropout, ("q_proj",))
        model = load_model(str(opt_dir), lora, dtype="auto", attention="sdpa", device=CPU).model.train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.5)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(model(input_ids=torch.tensor([ROWS[0]])).logits)
        assert torch.equal(*found) is wanted


def test_what_was_switched_off_is_told(opt_dir: Path, llama_dir: Path) -> None:
    lora = LoraSettings(2, 4.0, 0.1, ("q_proj",))
    shapes = [
        model_shape(folder, lora, dtype="auto", attention="sdpa", device=CPU, key="model.path")
        for folder in (opt_dir, llama_dir)
    ]
    assert [shape.dropout_off for shape in shapes] == ["dropout=0.1, attention_dropout=0.2", ""]


def test_a_refusal_names_the_key_and_the_directory(opt_dir: Path) -> None:
    """Before weights are read where the configuration tells, else when they have been."""
    lora = LoraSettings(2, 4.0, 0.1, ("q_proj",))
    config = json.loads((opt_dir / "config.json").read_text())
    (opt_dir / "config.json").write_text(json.dumps({**config, "input_jitter_noise": 0.5}))
    for call in (
        lambda: load_model(str(opt_dir), lora, dtype="auto", attention="sdpa", device=CPU, key="guard.path"),
        lambda: model_shape(opt_dir, lora, dtype="auto", attention="sdpa", device=CPU, key="guard.path"),
    ):
        with pytest.raises(ModelError, match=r"guard\.path='.*/opt': input_jitter_noise=0\.5 in config\.json"):
            call()


def test_a_gradient_that_leaks_between_rows_is_refused(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the forward pass are right."""
    model = built(make_llama().config)
    check_fitness(model, ROWS)
    right = Sdpa.spans

    def leaking(self: Any, query: Any, *rest: Any) -> torch.Tensor:
        return right(self, query, *rest) + 0.3 * (query.sum() - query.sum().detach())

    monkeypatch.setattr(Sdpa, "spans", leaking)
    with pytest.raises(ModelError, match="the gradient of packed rows differs from that of each row by itself"):
        check_fitness(model, ROWS)
    assert not model.training and not any(p.grad is not None for p in model.parameters())


def test_a_kernel_that_leaks_in_this_model_alone_is_named_with_the_way_out(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its self-test passed: another backend that fits is looked for among those that need no GPU."""
    model = built(make_llama().config)
    right = Sdpa.spans

    def first_row_s(self: Any, query: Any, *rest: Any) -> torch.Tensor:
        return right(self, query, *rest) + query[:1].mean()

    def refusal(**tried: str) -> str:
        model.set_attn_implementation(IMPLEMENTATIONS["varlen"])
        found = {"varlen": "", "flash_attention_2": "not installed", "sdpa": "", "eager": "", **tried}
        with pytest.raises(ModelError) as caught:
            try_fitness(model, ROWS, Choice("varlen", "auto", found))
        return str(caught.value)

    monkeypatch.setattr(Varlen, "spans", first_row_s)
    assert refusal().endswith("With sdpa in place of varlen it fits: set model.attention=sdpa")
    assert refusal(sdpa="wrong").endswith("With eager in place of varlen it fits: set model.attention=eager")
    monkeypatch.setattr(Sdpa, "spans", first_row_s)
    monkeypatch.setattr(Eager, "spans", first_row_s)
    assert "in place of" not in refusal()
