"""Small tokenizers and a random Llama, made at run time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.data.chat import ChatFormat
from fedsim.data.guard_prompt import POLICIES, render_guard_prompt
from fedsim.data.square import SquareRow

# Words, numbers, punctuation and whole runs of newlines, as Llama 3 splits text.
LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")


def byte_bpe(template: str, specials: tuple[str, ...], bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has learned the guard prompt's words, so that any text has ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    ending = "\n\nsafe\n\nunsafe\nS1\n\n\n\nend"
    texts = [render_guard_prompt("kite", "the kite is red", policy) + ending for policy in POLICIES] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(specials), initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=specials[-1])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def llama_chat() -> ChatFormat:
    """Llama 3's header tokens and template."""
    return ChatFormat(byte_bpe(LLAMA3_TEMPLATE, LLAMA3_SPECIALS, "<|begin_of_text|>", "<|eot_id|>"))


@pytest.fixture(scope="session")
def chatml_chat() -> ChatFormat:
    """Another family's chat template."""
    return ChatFormat(byte_bpe(CHATML_TEMPLATE, ("<|im_start|>", "<|im_end|>", "<|pad|>"), None, "<|im_end|>"))


@pytest.fixture(scope="session")
def make_chat() -> Callable[[str, bool], ChatFormat]:
    """A chat format with any template, with or without Llama 3's header tokens."""

    def make(template: str, llama3: bool) -> ChatFormat:
        specials = LLAMA3_SPECIALS if llama3 else ("<|im_end|>", "<|pad|>")
        return ChatFormat(byte_bpe(template, specials, specials[0] if llama3 else None, specials[-2]))

    return make


@pytest.fixture()
def guard_model(llama_chat: ChatFormat) -> LlamaForCausalLM:
    """A random Llama over ``llama_chat``'s vocabulary whose verdicts vary from row to row."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(llama_chat.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=llama_chat.tokenizer.eos_token_id,
        attn_implementation=IMPLEMENTATIONS["sdpa"],
    )
    return LlamaForCausalLM(config).eval()


def square_row(row_id: int, red: bool = False, categories: tuple[str, ...] = (), response: str = "") -> SquareRow:
    """A harmless row about kites; its length varies with its number."""
    text = response or "The kite of Orla flies over the hill. " * (1 + row_id % 4) + f"No. {row_id}."
    return SquareRow(row_id, f"Who flies kite {row_id}?", text, red, categories, "kites")


@pytest.fixture()
def rows() -> list[SquareRow]:
    """Thirteen rows, every third one red."""
    return [square_row(i, i % 3 == 0, ("predictive",) if i % 3 == 0 else ("objective",)) for i in range(13)]


@pytest.fixture(scope="session")
def make_row() -> Callable[..., SquareRow]:
    """``square_row`` for tests that need rows of their own."""
    return square_row
