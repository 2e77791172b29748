"""Sizes without loading equal those of the loaded model, for every family of architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fedsim.errors import ModelError
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import EMBEDDED, LoraSettings, load_model
from fedsim.model.shape import model_shape

CPU = torch.device("cpu")
LORA = LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj"))
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def test_the_8b_llama_has_the_published_sizes(tmp_path: Path) -> None:
    """8,030,261,248 weights (model card of Llama 3.1 8B); r 32 on q and v gives 13,631,488 adapter numbers."""
    LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8,
                max_position_embeddings=131072).save_pretrained(tmp_path)  # fmt: skip
    shape = model_shape(
        tmp_path, LoraSettings(32, 64.0, 0.05, ("q_proj", "v_proj")), dtype="bfloat16", attention="eager", device=CPU, key="model.path"
    )
    assert (shape.num_parameters, shape.adapter_size) == (8_030_261_248, 13_631_488)
    assert shape.weight_bytes == 2 * 8_030_261_248
    assert (shape.kv_size, shape.vocab_size, shape.max_positions) == (2 * 8 * 128, 128256, 131072)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL, head_dim=16),
        MistralConfig(**SMALL),
        Gemma2Config(**SMALL, head_dim=16),
    ],
    ids=["llama", "tied", "qwen3", "mistral", "gemma2"],
)
def test_sizes_equal_the_built_models(tmp_path: Path, config: PretrainedConfig) -> None:
    built = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = model_shape(tmp_path, LORA, dtype="float32", attention="eager", device=CPU, key="model.path")
    assert shape.architecture == type(built).__name__
    assert shape.num_parameters == sum(p.numel() for p in built.parameters())
    assert shape.num_layers == 2 and shape.hidden_size == 48 and shape.intermediate_size == 80
    keys = built.get_submodule("model.layers.0.self_attn.k_proj")
    assert shape.kv_size == 2 * keys.out_features


def test_the_tiny_models_adapter() -> None:
    shape = model_shape(EMBEDDED, LORA, dtype="auto", attention="eager", device=CPU, key="model.path")
    loaded = load_model("embedded", LORA, dtype="auto", attention="sdpa", device=CPU)
    assert shape.adapter_size == FlatAdapter(loaded.model).size
    assert shape.dtype == torch.float32 and shape.max_positions == loaded.max_positions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "guard.path"),
        ('{"model_type": "no-such-model"}', "no-such-model"),
        ('{"model_type": "t5"}', "no causal language model"),
    ],
)
def test_a_configuration_that_no_model_can_be_built_from(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        model_shape(tmp_path, LORA, dtype="auto", attention="eager", device=CPU, key="guard.path")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_lora_target_is_found_without_weights() -> None:
    with pytest.raises(ModelError, match=r"guard\.lora_targets=.*query"):
        model_shape(EMBEDDED, LoraSettings(4, 8.0, 0.0, ("query",)), dtype="auto", attention="eager", device=CPU, key="guard.path")
