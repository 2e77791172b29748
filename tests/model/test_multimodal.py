"""A model that also reads images: adapters, sizes and costs are those of the layers that text goes through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3TextConfig

from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import ChatFormat
from fedsim.model.cost import ModelCost
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora, load_model
from fedsim.model.shape import model_shape

CPU = torch.device("cpu")
LORA = LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj"))
TEXT: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "sliding_window": 64,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama3_bytes_chat: ChatFormat) -> Path:
    """A Gemma 3 with a vision tower of as many layers as its decoder, whose projections have the same names."""
    path = tmp_path_factory.mktemp("multimodal")
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=266,
                          boi_token_index=267, eoi_token_index=268)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(path))
    llama3_bytes_chat.tokenizer.save_pretrained(str(path))
    return path


def load(folder: Path, lora: LoraSettings = LORA) -> Any:
    return load_model(str(folder), lora, dtype="float32", attention="sdpa", device=CPU)


def test_no_adapter_lies_in_the_vision_tower(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    flat = FlatAdapter(loaded.model)
    vector = torch.randn(flat.size, generator=torch.Generator().manual_seed(1))
    flat.save(tmp_path, vector)
    with safe_open(str(tmp_path / "adapter_model.safetensors"), "pt") as file:
        names = list(file.keys())
    layer = r"base_model\.model\.model\.language_model\.layers\.[01]\.self_attn\.[qv]_proj\.lora_[AB]\.weight"
    assert len(names) == 2 * 2 * 2 and all(re.fullmatch(layer, name) for name in names)

    # PEFT puts the saved adapter onto the same layers, and its logits are fedsim's.
    base = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert not [n for n, _ in theirs.named_modules() if "vision" in n and "lora" in n]
    flat.load(vector)
    loaded.model.eval()
    ids = torch.tensor([[5, 7, 9, 11, 20]])
    with torch.no_grad():
        want = theirs(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(loaded.model(input_ids=ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(input_ids=ids, use_cache=False).logits - want).abs().max() > 1e-2


def test_a_text_models_adapter_is_saved_as_before(tmp_path: Path) -> None:
    model = attach_lora(Gemma3ForCausalLM(Gemma3TextConfig(**TEXT)), LORA)
    FlatAdapter(model).save(tmp_path, torch.zeros(FlatAdapter(model).size))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"] and settings["exclude_modules"] is None


def test_a_target_that_the_tower_alone_has_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no such layer in the model: fc1; choose from \[.*'v_proj'\]") as caught:
        load(folder, LoraSettings(4, 8.0, 0.0, ("q_proj", "fc1")))
    assert "out_proj" not in str(caught.value), "the tower's layers are not offered"


def test_the_head_can_still_have_an_adapter(folder: Path) -> None:
    names = [n for n, p in load(folder, LoraSettings(4, 8.0, 0.0, ("lm_head",))).model.named_parameters()
             if p.requires_grad]  # fmt: skip
    assert len(names) == 2 and all("lm_head" in name for name in names)


def test_costs_and_sizes_are_the_text_models(folder: Path, tmp_path: Path) -> None:
    """But the tower's weights are loaded, and count as memory."""
    torch.manual_seed(0)
    text = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT))
    text.save_pretrained(str(tmp_path))
    own = ModelCost.of(attach_lora(text, LORA).get_base_model())
    assert ModelCost.of(load(folder).base) == own
    whole, alone = (
        model_shape(path, LORA, dtype="float32", attention="sdpa", device=CPU, key="model.path")
        for path in (folder, tmp_path)
    )
    assert (whole.norm_size, whole.lora_size, whole.adapter_size) == (
        alone.norm_size, alone.lora_size, alone.adapter_size
    )  # fmt: skip
    assert whole.num_parameters > alone.num_parameters
