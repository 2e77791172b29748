"""Sizes without loading equal those of the loaded model, for every family of architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import EMBEDDED, load_model
from fedsim.model.shape import ModelShape, model_shape

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
        tmp_path,
        LoraSettings(32, 64.0, 0.05, ("q_proj", "v_proj")),
        dtype="bfloat16",
        attention="eager",
        device=CPU,
        key="model.path",
    )
    assert (shape.num_parameters, shape.adapter_size) == (8_030_261_248, 13_631_488)
    assert shape.weight_bytes == 2 * 8_030_261_248
    assert (shape.kv_size, shape.vocab_size, shape.max_positions) == (2 * 8 * 128, 128256, 131072)
    assert (shape.num_heads, shape.query_size, shape.norm_size, shape.lora_size) == (32, 4096, 65 * 4096, 64 * 4096)


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
    assert shape.query_size == built.get_submodule("model.layers.0.self_attn.q_proj").out_features
    normed: list[int] = []
    for module in built.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(lambda module, inputs: normed.append(inputs[0].numel()))
    built(torch.tensor([[1]]))
    assert sum(normed) <= shape.norm_size <= 1.2 * sum(normed), "a key head's norm counts as a query head's"
    adapted = [m for name, m in built.named_modules() if name.rpartition(".")[2] in LORA.targets]
    assert shape.lora_size == sum(m.in_features for m in adapted if isinstance(m, torch.nn.Linear)) > 0


FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),  # its experts are merged as they are loaded
    "gemma2": Gemma2Config(**SMALL, head_dim=16),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16),
    "gpt2": GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=64),
}


def sizes(folder: Path) -> ModelShape:
    return model_shape(folder, None, dtype="float32", attention="eager", device=CPU, key="guard.path")


def change(folder: Path, **settings: Any) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_fit_the_configuration_pass(tmp_path: Path, family: str, shards: bool) -> None:
    built = AutoModelForCausalLM.from_config(FAMILIES[family])
    built.save_pretrained(tmp_path, max_shard_size="50KB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    assert sizes(tmp_path).num_parameters == sum(p.numel() for p in built.parameters())
    (tmp_path / "consolidated.safetensors").write_bytes(b"no file that transformers reads")
    sizes(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_found_without_reading_them(
    tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    capfd.readouterr()
    wide = {"n_inner": 64} if family == "gpt2" else {"intermediate_size": 160}
    whole = (tmp_path / "config.json").read_text()
    change(tmp_path, **wide)
    with pytest.raises(ModelError, match=r"guard\.path=.* lack \d+ tensors of the shapes .*\.mlp\."):
        sizes(tmp_path)
    (tmp_path / "config.json").write_text(whole)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    lost = next(name for name in sorted(tensors) if ".1." in name and name.endswith("weight"))
    save_file({n: t for n, t in tensors.items() if n != lost}, str(tmp_path / "model.safetensors"), {"format": "pt"})
    if family != "mixtral" or "experts" not in lost:
        with pytest.raises(ModelError, match=rf"lack 1 tensors .*{lost}"):
            sizes(tmp_path)
    assert capfd.readouterr() == ("", ""), "one error, and no report of transformers' beside it"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_may_be_lacking_only_where_it_is_tied(tmp_path: Path, tied: bool) -> None:
    """A model saved without its head has names without a prefix, which transformers adds."""
    AutoModel.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(str(tmp_path / "model.safetensors"))
    if tied:
        sizes(tmp_path)
    else:
        with pytest.raises(ModelError, match=r"lack 1 tensors .* such as lm_head\.weight"):
            sizes(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pad_token_id": 400}, "describes no causal language model"),
        ({"hidden_size": -48}, "config.json"),
        ({"intermediate_size": -80}, "describes no causal language model"),
        ({"vocab_size": -1}, "describes no causal language model"),
        ({"num_attention_heads": 0}, r"config\.json cannot be loaded"),
        ({"num_hidden_layers": "two"}, r"config\.json cannot be loaded"),
    ],
)
def test_values_that_make_no_sense_are_one_error(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    known.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(known | settings))
    with pytest.raises(ModelError, match=words) as caught:
        sizes(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_attention_that_is_not_there_is_found_without_weights() -> None:
    for make in (
        lambda name: model_shape(EMBEDDED, LORA, dtype="auto", attention=name, device=CPU, key="model.path"),
        lambda name: load_model("embedded", LORA, dtype="auto", attention=name, device=CPU),
    ):
        with pytest.raises(ModelError, match=r"model\.attention='flash_attention_2': runs only on CUDA"):
            make("flash_attention_2")


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
        model_shape(
            EMBEDDED,
            LoraSettings(4, 8.0, 0.0, ("query",)),
            dtype="auto",
            attention="eager",
            device=CPU,
            key="guard.path",
        )
