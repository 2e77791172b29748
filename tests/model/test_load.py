"""Loading: a frozen base with LoRA on the named layers, and errors that name the key and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.digests import FileDigests
from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import ChatFormat
from fedsim.model.load import (
    EMBEDDED,
    LoadedModel,
    attach_lora,
    check_model_dir,
    load_model,
    model_digest,
    model_dir,
    stop_ids,
)

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
    assert loaded.max_positions == 512 and loaded.base.config._attn_implementation == IMPLEMENTATIONS["sdpa"]
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


@pytest.fixture(scope="module")
def sharded_dir(make_llama: Callable[..., LlamaForCausalLM], llama_dir: Path, tmp_path_factory: Any) -> Path:
    """The same model in several weight files."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    shutil.copytree(llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    make_llama().save_pretrained(str(folder), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def cut(file: Path, share: float = 0.5) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])


def drop_a_layer(folder: Path) -> None:
    """Files and index agree, but a layer's weights are in none of them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        kept = {n: t for n, t in load_file(str(file)).items() if "layers.1.mlp" not in n}
        save_file(kept, str(file), metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "layers.1.mlp" not in n}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def widen(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 50}))


def shrink_vocabulary(folder: Path) -> None:
    """A model whose embeddings end before the tokenizer's special tokens."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 257, "pad_token_id": None}))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(str(file))
        short = {n: t[:257].clone() if n in ("lm_head.weight", "model.embed_tokens.weight") else t
                 for n, t in tensors.items()}  # fmt: skip
        save_file(short, str(file), metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        lambda d: min(d.glob("*.safetensors")).unlink(),
        r"1 of the \d weight files .* not there, such as model-00001-of-0000\d\.safetensors; download",
    ),
    "a shard is cut short": (lambda d: cut(max(d.glob("*.safetensors"))), r"-of-0000\d\.safetensors is damaged or cut"),
    "a shard has no header": (lambda d: cut(max(d.glob("*.safetensors")), 0.01), r"safetensors is damaged or cut"),
    "the index is not JSON": (lambda d: cut(d / "model.safetensors.index.json"), r"index\.json is not valid JSON"),
    "the config is not JSON": (lambda d: cut(d / "config.json"), r"config\.json is not valid JSON .*download it again"),
    "the tokenizer is cut short": (lambda d: cut(d / "tokenizer.json"), r"tokenizer\.json is not valid JSON"),
    "the tokenizer is empty": (lambda d: (d / "tokenizer.json").write_text("{}"), r"cannot be loaded"),
    "the tokenizer is a list": (
        lambda d: (d / "tokenizer.json").write_text("[]"),
        r"tokenizer\.json must be a JSON obj",
    ),
    "the template is cut short": (lambda d: cut(d / "chat_template.jinja"), r"chat template of .* cannot write"),
    "a layer has no weights": (drop_a_layer, r"lack 3 tensors .* such as model\.layers\.1\.mlp\.\w+\.weight"),
    "weights of another shape": (widen, r"lack 6 tensors .* such as model\.layers\.0\.mlp"),
    "the config makes no sense": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "two"}'),
        r"its config\.json cannot be loaded",
    ),
    "a larger tokenizer": (shrink_vocabulary, r"is token 2(59|60), but the model has 257 embeddings"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_error(
    sharded_dir: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded_dir, folder)
    load(folder)
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder, key="guard.path")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "one error, and no report of transformers' beside it"


def test_an_attention_that_the_model_lacks_is_named(llama_dir: Path, tmp_path: Path) -> None:
    """Gemma 2 caps its scores, which torch's fused attention cannot do; it is not dropped in silence."""
    folder = tmp_path / "gemma"
    shutil.copytree(llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = Gemma2Config(vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    AutoModelForCausalLM.from_config(settings).save_pretrained(str(folder))
    with pytest.raises(ModelError, match=r"model\.attention='sdpa': cannot cap scores.*eager"):
        load(folder)


def test_other_errors_name_the_key(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path=.*nowhere.*is not a directory; .*hf download ORG.*'embedded'"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"hf download meta-llama/Llama-3\.1-8B-Instruct --local-dir"):
        check_model_dir("meta-llama/Llama-3.1-8B-Instruct", "model.path")
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
    folder, digests = tmp_path / "copy", FileDigests(tmp_path / "artefacts")
    shutil.copytree(llama_dir, folder)
    digest = model_digest(str(folder), digests)
    assert digest == model_digest(str(llama_dir), digests), "the place does not matter"
    (folder / "README.md").write_text("notes")
    assert model_digest(str(folder), digests) == digest
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert model_digest(str(folder), digests) != digest, name
        (folder / name).write_bytes(before)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(str(folder), digests) != digest


NAMED = [
    ('{"eos_token_id": [259, 7]}', '{"eos_token_id": 5}', [259, 7]),
    ('{"eos_token_id": 7}', "{}", [7]),
    ('{"pad_token_id": 7}', '{"eos_token_id": 5}', [5]),
    (None, '{"eos_token_id": [5, 6]}', [5, 6]),
    ("{}", '{"text_config": {"eos_token_id": 9}}', [9]),
    (None, "{}", []),
]


@pytest.mark.parametrize(("generation", "config", "want"), NAMED)
def test_end_ids_are_those_of_the_generation_configuration_or_else_of_the_models(
    generation: str | None, config: str, want: list[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    (tmp_path / "config.json").write_text(config)
    assert stop_ids(tmp_path, "model.path") == want


@pytest.mark.parametrize("value", ['"</s>"', "-1", "[1, 2.5]", "true", "[[1]]"])
def test_an_end_id_that_is_no_token_id_is_an_error(value: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(
        ModelError, match=r"model\.path: .*generation_config\.json's eos_token_id is .* a token id or a"
    ):
        stop_ids(tmp_path, "model.path")


def test_generation_ends_where_the_models_configuration_says(llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [259, 7]}')
    assert load(folder).chat.end_ids == {259, 7}
