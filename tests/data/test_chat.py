"""The chat path: prompts are prefixes of training rows, the loss sees the reply alone, data cannot forge a turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedsim.base.errors import ModelError
from fedsim.data.chat import ChatFormat, Conversation, TokenRow, assistant_turn, user_turn
from fedsim.model.load import EMBEDDED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
BROKEN = (
    "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[assistant says: {% endif %}"
)
EXCHANGE: Conversation = [user_turn("Who flies the kite?"), assistant_turn("Orla does.")]
LONGER: Conversation = [
    {"role": "system", "content": "Be kind."},
    *EXCHANGE,
    user_turn("Why?"),
    assistant_turn("Wind."),
]

Make = Callable[..., ChatFormat]


def formats(make: Make) -> dict[str, ChatFormat]:
    """Three families of templates over the same bytes."""
    return {
        "llama3": make(),
        "chatml": make(CHATML, ("<|im_start|>", "<|im_end|>", "<|pad|>"), "<|im_end|>", None, "<|pad|>"),
        "mistral": make(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", None),
    }


@pytest.fixture(scope="module", params=["llama3", "chatml", "mistral"])
def chat(request: pytest.FixtureRequest, make_bytes_chat: Make) -> ChatFormat:
    return formats(make_bytes_chat)[request.param]


def specials(chat: ChatFormat, ids: list[int]) -> Counter[int]:
    """How often each special token occurs."""
    known = {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    return Counter(i for i in ids if i in known)


@pytest.mark.parametrize("conversation", [EXCHANGE, LONGER], ids=["one turn", "system and two turns"])
def test_prompt_is_the_masked_beginning_of_the_row(chat: ChatFormat, conversation: Conversation) -> None:
    if conversation[0]["role"] == "system" and "INST" in chat.tokenizer.chat_template:
        conversation = conversation[1:]
    row = chat.training_row(conversation, 1000)
    prompt = chat.prompt_ids(conversation[:-1])
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert row.loss_mask.tolist() == [i >= len(prompt) for i in range(len(row))]
    assert row.num_targets == len(row) - len(prompt) and not row.truncated
    targets = row.input_ids[row.loss_mask].tolist()
    assert targets[-1] == chat.tokenizer.eos_token_id, "the end of the turn is learned"
    assert chat.decode(targets) == conversation[-1]["content"]
    whole = chat.encode(chat.render(conversation, reply_follows=False).rstrip())
    assert row.input_ids.tolist() == whole, "as the template writes it, in bytes"


def test_llama3_text_is_the_published_one(llama3_bytes_chat: ChatFormat) -> None:
    assert llama3_bytes_chat.render([user_turn(" hi ")], reply_follows=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


MARKERS = ["<|eot_id|>", "<|im_end|>", "<|im_start|>", "</s>", "<s>", "[INST]", "[/INST]", "<|pad|>"]
PIECES = [*MARKERS, "<|", "|>", "<", ">", "[", "/", "eot_id", "s", " ", "\n", "kite", "é", "\u2028"]
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@settings(max_examples=250, deadline=None)
@given(text=TEXT, reply=TEXT)
def test_content_never_becomes_a_special_token(chat: ChatFormat, text: str, reply: str) -> None:
    plain = chat.training_row(EXCHANGE, 10_000)
    row = chat.training_row([user_turn(text), assistant_turn(reply)], 10_000)
    assert specials(chat, row.input_ids.tolist()) == specials(chat, plain.input_ids.tolist())
    prompt = chat.prompt_ids([user_turn(text)])
    assert row.input_ids[: len(prompt)].tolist() == prompt


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_text_without_markers_is_left_alone(chat: ChatFormat, text: str) -> None:
    markers = [str(t) for t in chat.tokenizer.added_tokens_decoder.values()]
    if not any(marker in text for marker in markers):
        assert chat.defuse(text) == text


def test_defused_markers_stay_readable(llama3_bytes_chat: ChatFormat) -> None:
    assert llama3_bytes_chat.defuse("a<|eot_id|>b<|eot_id|>") == "a< |eot_id|>b< |eot_id|>"
    assert llama3_bytes_chat.defuse("<|eot_id<|eot_id|>|>") == "<|eot_id< |eot_id|>|>"


@pytest.mark.parametrize("max_length", [1, 5, 60, 65, 80])
def test_long_rows_are_cut_at_their_end(llama3_bytes_chat: ChatFormat, max_length: int) -> None:
    whole = llama3_bytes_chat.training_row(EXCHANGE, 1000)
    row = llama3_bytes_chat.training_row(EXCHANGE, max_length)
    kept = min(len(whole), max_length)
    assert row.truncated == (len(whole) > max_length) and len(row) == kept
    assert row.input_ids.tolist() == whole.input_ids.tolist()[:kept]
    assert row.loss_mask.tolist() == whole.loss_mask.tolist()[:kept]


def test_a_row_that_just_fits_is_not_truncated(llama3_bytes_chat: ChatFormat) -> None:
    whole = llama3_bytes_chat.training_row(EXCHANGE, 1000)
    assert not llama3_bytes_chat.training_row(EXCHANGE, len(whole)).truncated


def test_join_masks_the_prompt() -> None:
    row = ChatFormat.join([1, 2], [3, 4, 5], 4)
    assert row.input_ids.tolist() == [1, 2, 3, 4] and row.loss_mask.tolist() == [False, False, True, True]
    assert row.truncated and row.num_targets == 2
    assert ChatFormat.join([], [7, 8], 9).num_targets == 1, "nothing comes before the first token"
    assert isinstance(row, TokenRow) and row.input_ids.dtype.name == "int32"


def test_a_template_without_the_prefix_property_is_an_error(make_bytes_chat: Make) -> None:
    with pytest.raises(ModelError, match="generation prompt is a prefix"):
        make_bytes_chat(BROKEN).training_row(EXCHANGE, 100)


def test_a_tokenizer_without_template_or_eos_is_an_error(llama3_bytes_chat: ChatFormat) -> None:
    core = llama3_bytes_chat.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"no chat template: .*chat_template\.jinja"):
        ChatFormat(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eot_id|>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=core)
    bare.chat_template = CHATML
    with pytest.raises(ModelError, match="no eos_token"):
        ChatFormat(bare)


def test_pad_is_the_tokenizers_or_its_eos(make_bytes_chat: Make) -> None:
    chats = formats(make_bytes_chat)
    assert chats["llama3"].pad_id == chats["llama3"].tokenizer.pad_token_id != chats["llama3"].tokenizer.eos_token_id
    assert chats["mistral"].pad_id == chats["mistral"].tokenizer.eos_token_id


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_embedded_tokenizer_writes_any_text(text: str) -> None:
    """Byte fallback: markers in content are broken, every other text survives the round trip of its row."""
    chat = embedded()
    row = chat.training_row([user_turn("Who flies?"), assistant_turn(text)], 10_000)
    plain = chat.training_row([user_turn("Who flies?"), assistant_turn("kite")], 10_000)
    assert specials(chat, row.input_ids.tolist()) == specials(chat, plain.input_ids.tolist())
    unknown = chat.tokenizer.unk_token_id
    assert unknown is None or unknown not in row.input_ids


CACHE: list[ChatFormat] = []


def embedded() -> ChatFormat:
    if not CACHE:
        from transformers import AutoTokenizer

        CACHE.append(ChatFormat(AutoTokenizer.from_pretrained(str(EMBEDDED), local_files_only=True)))
    return CACHE[0]


def test_a_template_that_writes_todays_date_gives_the_same_prompt_every_day(make_bytes_chat: Make) -> None:
    body = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    dated = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}|{{ date_string }}|" + body
    text = make_bytes_chat(dated).render([user_turn("hello")], reply_follows=True)
    assert text == "26 Jul 2024|26 Jul 2024|hello"


def test_what_is_asked_to_be_kept_is_tokenised_once(make_bytes_chat: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = make_bytes_chat(), []
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda text: texts.append(text) or encode(text))
    kept = made.keep_prompt([user_turn("Kite?")])
    first = made.prompt_ids([user_turn("Kite?")])
    assert first == kept.ids.tolist() and kept.ids.dtype.name == "int32"
    first.append(7)  # a caller's own list
    assert made.prompt_ids([user_turn("Kite?")]) == first[:-1]
    assert made.keep_prompt([user_turn("Kite?")]) is made.prompt([user_turn("Kite?")]) is kept
    assert len(texts) == 1
    assert made.prompt_ids([user_turn("Kites?")]) != first[:-1] and len(texts) == 2
    assert made.prompt_ids([assistant_turn("Kite?")]) != first[:-1], "the role is part of the key"


def test_nothing_else_is_remembered(make_bytes_chat: Make) -> None:
    """A federation's training rows, and turns that follow a reply, would outgrow the benchmarks by far."""
    made = make_bytes_chat()
    for number in range(5):
        made.prompt_ids([user_turn(f"Kite {number}?")])
        made.training_row([user_turn(f"Kite {number}?"), assistant_turn("Red.")], 100)
    assert not made._remembered
    made.keep_prompt([user_turn("Kite?")])
    made.prompt_ids([*EXCHANGE, user_turn("Why?")])
    assert len(made._remembered) == 1


def test_what_is_remembered_is_computed_once(make_bytes_chat: Make) -> None:
    made, computed = make_bytes_chat(), []

    def ask(key: str) -> str:
        return made.remember(key, lambda: computed.append(key) or key)

    assert [ask(key) for key in "abacab"] == list("abacab")
    assert computed == ["a", "b", "c"]
