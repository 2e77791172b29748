"""The tiny tokenizer round-trips any text and has Llama 3's form; the tiny model keeps to its size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedsim.data.guard_prompt import POLICIES, render_guard_prompt
from fedsim.world.lexicon import SLOT_WORDS
from fedsim.world.tiny_model import CONTEXT, TINY_DIR, build_model, build_tokenizer, world_texts

TOKENIZER = build_tokenizer()
PLANES = st.integers(0, 0x10FFFF).filter(lambda c: not 0xD800 <= c <= 0xDFFF).map(chr)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(st.one_of(st.text(), st.text(PLANES), st.text("aZ .?!'\n\t\r ()[]\u3000é\u0301")))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(ids(text)) == text


def test_every_unicode_plane_round_trips() -> None:
    for plane in range(17):
        chars = [chr(c) for c in range(plane << 16, (plane + 1) << 16, 251) if not 0xD800 <= c <= 0xDFFF]
        text = "kite " + "".join(chars)
        assert TOKENIZER.decode(ids(text)) == text


def test_words_of_the_world_are_one_token_each() -> None:
    for words in SLOT_WORDS.values():
        for text in words:
            assert len(ids(f" {text}")) == len(text.split()), text


def test_fixed_texts_of_the_world_need_no_byte_fallback() -> None:
    alphabet_size = 256
    for text in world_texts():
        pieces = TOKENIZER.convert_ids_to_tokens(ids(text))
        strange = [
            p
            for p, i in zip(pieces, ids(text), strict=True)
            if i < alphabet_size and p.isalpha() and p not in "aAIBSĊĠ"
        ]
        assert not strange, (text[:60], strange)


def test_verdicts_start_with_two_different_single_tokens() -> None:
    (blank,) = ids("\n\n")
    safe, unsafe = ids("\n\nsafe"), ids("\n\nunsafe\nS1,S3")
    assert safe[0] == unsafe[0] == blank
    assert len(safe) == 2 and safe[1] != unsafe[1]
    assert ids("safe") == safe[1:] and ids("unsafe") == [unsafe[1]]


def test_special_tokens_are_llama_3s_and_padding_is_not_the_end() -> None:
    assert TOKENIZER.bos_token == "<|begin_of_text|>" and TOKENIZER.eos_token == "<|eot_id|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    for token in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"):
        assert len(ids(token)) == 1


def test_chat_template_is_llama_3s() -> None:
    chat = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hi\n\n"},
        {"role": "assistant", "content": "Yes."},
    ]
    text = str(TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    start = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == text.removesuffix(start)


def test_a_guard_prompt_is_short_enough_to_train_on() -> None:
    for policy in POLICIES:
        assert len(ids(render_guard_prompt("Is it?", "No.", policy))) < 260


def test_the_model_is_small_and_takes_the_whole_context() -> None:
    model = build_model(TOKENIZER, seed=0).eval()
    assert model.num_parameters() < 1_000_000
    assert model.config.max_position_embeddings == CONTEXT == 4096
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with torch.inference_mode():
        logits = model(torch.full((1, CONTEXT), 7), logits_to_keep=1).logits
    assert logits.isfinite().all()


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_model(TOKENIZER, seed=3)
    torch.manual_seed(6)
    second, third = build_model(TOKENIZER, seed=3), build_model(TOKENIZER, seed=4)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIR)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def test_the_shipped_tokenizer_is_the_built_one(shipped: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    assert shipped.chat_template == TOKENIZER.chat_template
    for text in (*world_texts(), "Zum Beispiel: naïve 東京 🙂 3.14\n\n\n x"):
        assert shipped.encode(text, add_special_tokens=False) == ids(text)
        assert shipped.decode(ids(text)) == text
    assert (shipped.pad_token, shipped.eos_token, shipped.bos_token) == ("<|pad|>", "<|eot_id|>", "<|begin_of_text|>")


def test_the_shipped_model_loads_like_any_users_model(shipped: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_DIR)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(shipped)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == shipped.eos_token_id
    assert (TINY_DIR / "model.safetensors").stat().st_size <= 4 * 2**20
