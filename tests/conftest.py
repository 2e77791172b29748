"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.data.chat import ChatFormat
from fedsim.data.world import square_rows
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, LoraSettings, attach_lora

ROOT = Path(__file__).parents[1]
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")

torch.set_num_threads(1)  # part of exact mode's contract


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real public data files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("FEDSIM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "square").is_dir():
        pytest.skip(f"no public data files in {folder}; set FEDSIM_TEST_DATA to a folder that holds them")
    return folder


def bytes_chat(
    template: str = LLAMA3_TEMPLATE,
    specials: tuple[str, ...] = LLAMA3_SPECIALS,
    eos: str = "<|eot_id|>",
    bos: str | None = "<|begin_of_text|>",
    pad: str | None = "<|pad|>",
) -> ChatFormat:
    """A chat format whose tokens are the 256 bytes and ``specials``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def random_llama(vocab_size: int = 261, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random grouped-query Llama, 2 layers of width 32, whose logits differ clearly between tokens and positions."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 259,
        "pad_token_id": 260,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def adapted_llama(
    *,
    seed: int = 0,
    r: int = 4,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    std: float = 0.0,
) -> tuple[LoadedModel, FlatAdapter]:
    """A random Llama with LoRA in a flat adapter; normal numbers of deviation ``std`` in it, or PEFT's start if 0."""
    base = random_llama(seed=seed)
    base.requires_grad_(False)
    loaded = LoadedModel(attach_lora(base, LoraSettings(r, 2.0 * r, dropout, targets)), bytes_chat())
    flat = FlatAdapter(loaded.model)
    if std > 0:
        flat.load(torch.randn(flat.size, generator=torch.Generator().manual_seed(seed)) * std)
    else:
        flat.load(flat.initial(seed))
    return loaded, flat


@pytest.fixture(scope="session")
def make_bytes_chat() -> Callable[..., ChatFormat]:
    """``make_bytes_chat(template, specials, eos, bos, pad)``: see :func:`bytes_chat`."""
    return bytes_chat


@pytest.fixture(scope="session")
def llama3_bytes_chat() -> ChatFormat:
    """Llama 3's template and markers over bytes."""
    return bytes_chat()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """``make_llama(vocab_size=261, seed=0, **config)``: see :func:`random_llama`."""
    return random_llama


@pytest.fixture(scope="session")
def make_adapted() -> Callable[..., tuple[LoadedModel, FlatAdapter]]:
    """``make_adapted(seed=, r=, dropout=, targets=, std=)``: see :func:`adapted_llama`."""
    return adapted_llama


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama and its tokenizer, as a user would give it."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama().save_pretrained(str(folder))
    bytes_chat().tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def square_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 rows of the embedded corpus, 60 of them red, as a SQuARe file."""
    rows = square_rows()
    red = [row for row in rows if row["acceptable?"] == 0][:60]
    acceptable = [row for row in rows if row["acceptable?"] == 1][:90]
    path = tmp_path_factory.mktemp("square") / "square.json"
    path.write_text(json.dumps(red + acceptable), encoding="utf-8")
    return path
