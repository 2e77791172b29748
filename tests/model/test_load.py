"""Loading: a frozen base with LoRA on the named layers, and errors that name the key and the fix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from fedsim.data.chat import ChatFormat
from fedsim.errors import ModelError
from fedsim.model.load import EMBEDDED, LoadedModel, LoraSettings, attach_lora, load_model, model_digest, model_dir

LORA = LoraSettings(4, 16.0, 0.1, ("q_proj", "down_proj"))
CPU = torch.device("cpu")


def load(path: Path | str, lora: LoraSettings = LORA, dtype: str = "auto", key: str = "model.path") -> LoadedModel:
    return load_model(str(path), lora, dtype=dtype, attention="sdpa", device=CPU, key=key)


def test_a_directory_gives_a_frozen_base_with_lora(
    llama_dir: Path, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    loaded = load(llama_dir)
    trainable = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in n for n in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert loaded.max_positions == 512 and loaded.base.config._attn_implementation == "sdpa"
    stored = make_llama().state_dict()
    own = {n.replace(".base_layer", ""): t for n, t in loaded.base.state_dict().items() if "lora_" not in n}
    assert set(own) == set(stored) and all(torch.equal(own[n], stored[n]) for n in own)
    assert loaded.chat.prompt_ids([{"role": "user", "content": "a"}])[:2] == [256, 257]


def test_dtypes(llama_dir: Path) -> None:
    loaded = load(llama_dir, dtype="bfloat16")
    kinds = {("lora_" in n, p.dtype) for n, p in loaded.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}, "LoRA stays in fp32"
    assert load(llama_dir, dtype="auto").base.dtype == torch.float32


def test_lora_equals_pefts_own(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Scale alpha / r on the same layers: both give the same logits for the same numbers."""
    settings = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    mine, theirs = attach_lora(make_llama(), LORA), get_peft_model(make_llama(), settings)
    names = [n for n, p in mine.named_parameters() if p.requires_grad]
    assert names == [n for n, p in theirs.named_parameters() if p.requires_grad]
    for i, name in enumerate(names):
        values = torch.randn(mine.get_parameter(name).shape, generator=torch.Generator().manual_seed(i))
        mine.get_parameter(name).data.copy_(values)
        theirs.get_parameter(name).data.copy_(values)
    ids = torch.arange(30)[None]
    assert torch.equal(mine.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_the_embedded_model_loads() -> None:
    assert model_dir("embedded") == EMBEDDED
    loaded = load("embedded", LoraSettings(2, 4.0, 0.0, ("q_proj",)))
    assert isinstance(loaded.chat, ChatFormat) and loaded.max_positions >= 4096
    assert sum(p.numel() for p in loaded.base.parameters()) < 5_000_000
    assert len(loaded.chat.tokenizer) <= loaded.base.config.vocab_size


@pytest.mark.parametrize(
    ("removed", "words"),
    [("config.json", "config.json"), ("*.safetensors", r"weights \(\*\.safetensors\)"), ("tokenizer*", "tokenizer")],
)
def test_an_incomplete_directory_is_an_error(llama_dir: Path, tmp_path: Path, removed: str, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    for file in list(folder.glob(removed)):
        file.unlink()
    with pytest.raises(ModelError, match=rf"guard\.path=.*holds no {words}.*complete Hugging Face model directory"):
        load(folder, key="guard.path")


def test_other_errors_name_the_key(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path=.*nowhere.*is not a directory; .*'embedded'"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match=r"model\.path=.*cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", [("nope",), ("q_proj", "v_porj")])
def test_a_target_that_no_layer_has_is_an_error(llama_dir: Path, targets: tuple[str, ...]) -> None:
    """Also when others are there: a misspelt name may not silently train less."""
    with pytest.raises(ModelError, match=r"guard\.lora_targets=.*no such layer.*'down_proj'.*'q_proj'") as caught:
        load(llama_dir, LoraSettings(4, 8.0, 0.0, targets), key="guard.path")
    assert targets[-1] in str(caught.value)


def test_digest_follows_what_decides_the_output(llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama_dir, folder)
    digest = model_digest(str(folder))
    assert digest == model_digest(str(llama_dir)), "the place does not matter"
    (folder / "README.md").write_text("notes")
    assert model_digest(str(folder)) == digest
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert model_digest(str(folder)) != digest, name
        (folder / name).write_bytes(before)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(str(folder)) != digest
