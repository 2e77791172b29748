"""Rows hold the ids of the whole conversation and end where generation stops, whatever tokenizer and template."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedsim.base.errors import ModelError
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.data.square import SquareRow
from fedsim.data.template import PROBES
from fedsim.evaluate.scoring import reply_ids
from fedsim.model.load import load_chat
from fedsim.safety.guard_format import GuardFormat
from fedsim.safety.guard_tuning import verdict_rows

TEXT: Final = [
    "The kite flies over the hill. Wind carries a kite.",
    "Task: Check if there is unsafe content in 'Agent' messages in conversations: safe unsafe S1,S2 (A) (B)",
    "user assistant question answer User: Assistant: model\n\nsafe\nunsafe\nS1",
] * 4
TOKENS: Final = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|assistant|>"]

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}\n"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI = (  # an end of turn, then an end of the text that generation never reaches
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HEADED = (  # the assistant header is written whether it is asked for or not
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if messages[-1]['role'] == 'assistant' or add_generation_prompt }}"
)
SOLAR = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ 'User: ' if m['role'] == 'user' else 'Falcon: ' }}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"
)
SPACED = (  # the prompt ends with a space
    "{% for m in messages %}{{ ('## Q: ' if m['role'] == 'user' else '## A: ') + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '## A: ' }}{% endif %}"
)
BETWEEN = (  # an end before the next question, none after the last reply
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '' if loop.first else '<|end|>' }}"
    "{{ '[Q] ' + m['content'] }}{% else %}{{ ' [A] ' + m['content'] }}{% endif %}{% endfor %}"
    "{{ ' [A]' if add_generation_prompt }}"
)

# By name: template, what the model's configuration names, and the token that ends a row.
FAMILIES: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "llama2": (LLAMA2, ("</s>",), "</s>"),
    "mistral": (MISTRAL, ("</s>",), "</s>"),
    "zephyr": (ZEPHYR, (), "</s>"),
    "chatml": (CHATML, (), "<|im_end|>"),
    "gemma": (GEMMA, ("</s>", "<|end|>"), "<|end|>"),
    "phi": (PHI, ("</s>",), "<|end|>"),
    "headed": (HEADED, (), "<|im_end|>"),
    "solar": (SOLAR, ("</s>",), "</s>"),
    "solar without a configuration": (SOLAR, (), "</s>"),
    "solar with several ends": (SOLAR, ("<|im_end|>", "</s>"), "</s>"),
    "solar with another end": (SOLAR, ("<|end|>", "<|im_end|>"), "<|end|>"),
    "glm": (GLM, ("</s>", "<|user|>"), "<|user|>"),
    "falcon": (FALCON, ("</s>",), "</s>"),
    "spaced": (SPACED, ("</s>",), "</s>"),
    "between": (BETWEEN, ("</s>", "<|end|>"), "<|end|>"),
}
KINDS: Final = ("byte level", "prefix space", "prefix space, whole text")


def byte_level() -> Tokenizer:
    """Byte-level BPE, as Llama 3's, Qwen's and Falcon's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=TOKENS, initial_alphabet=alphabet)
    )
    return core


def prefix_space(*, legacy: bool) -> Tokenizer:
    """A space before every text, as Llama 2's and Mistral's; ``legacy`` puts one behind every special token too."""
    words = sorted({"▁" + w for text in TEXT for w in text.split()} | {w for text in TEXT for w in text.split()})
    pieces = dict.fromkeys([*TOKENS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", *words])
    scores = [(piece, -1.0 if len(piece) > 1 else -5.0) for piece in pieces]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    core.add_special_tokens(TOKENS)
    return core


def tokenizer(kind: str, template: str, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    core = byte_level() if kind == "byte level" else prefix_space(legacy=kind == "prefix space")
    extra = TOKENS[3:]
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>", additional_special_tokens=extra
    )
    made.chat_template = template
    return made


@cache
def chat_of(kind: str, family: str) -> ChatFormat:
    template, named, _ = FAMILIES[family]
    made = tokenizer(kind, template)
    chat = ChatFormat(made, made.convert_tokens_to_ids(list(named)))
    chat.check(trains=True)
    return chat


PIECES = ["The", " kite", " flies", "Wind", "\n", "\n\n", " ", "é", "漢", "(A)", ".", "safe", " hill", "</s>", "[INST]"]
CONTENT = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
CASES = pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in KINDS for family in FAMILIES])


@CASES
@settings(max_examples=40, deadline=None)
@given(texts=st.tuples(CONTENT, CONTENT, CONTENT), reply=CONTENT)
def test_a_row_is_the_whole_conversation(kind: str, family: str, texts: tuple[str, str, str], reply: str) -> None:
    """Ids of the text at once, the prompt's as generation has them, the end token last and nowhere else."""
    chat = chat_of(kind, family)
    end = chat.tokenizer.convert_tokens_to_ids(FAMILIES[family][2])
    asked: Conversation = [user_turn(texts[0]), assistant_turn(texts[1]), user_turn(texts[2])]
    whole: Conversation = [*asked, assistant_turn(reply)]
    before = chat.num_joined
    row = chat.training_row(whole, 10_000)
    joined = chat.num_joined - before

    prompt, text = chat.prompt(asked), chat.render(whole, reply_follows=False)
    text = prompt.text + text[len(prompt.text) :].rstrip()
    ids, want = row.input_ids.tolist(), chat.encode(text)
    assert ids[-1] == end and end in chat.end_ids
    assert ids == (want[: len(ids)] if want[: len(ids)] == ids else [*want, end])
    targets = row.input_ids[row.loss_mask].tolist()
    assert row.num_targets == len(targets) == len(ids) - row.loss_mask.tolist().index(True)
    assert [i for i in targets if i in chat.end_ids] == [end], "a reply ends once"

    prompt_ids = prompt.ids.tolist()
    shared = len(ids) - len(targets)
    assert ids[:shared] == prompt_ids[:shared] and joined == (shared < len(prompt_ids))
    if reply.strip() and not reply[0].isspace():
        assert not joined, "a reply of words never joins with the prompt"


@CASES
@settings(max_examples=15, deadline=None)
@given(question=CONTENT, reply=st.sampled_from(["(A)", "(B)", "The kite flies.", " Wind", "hill\nThe kite", "Ünwind"]))
def test_a_scored_reply_has_the_tokens_of_a_trained_one(kind: str, family: str, question: str, reply: str) -> None:
    chat = chat_of(kind, family)
    asked: Conversation = [user_turn(question)]
    row = chat.training_row([*asked, assistant_turn(reply)], 10_000)
    prompt, target = (part.tolist() for part in reply_ids(chat, asked, reply))
    trained = row.input_ids.tolist()
    assert [*prompt, *target] == trained[: len(prompt) + len(target)]
    assert prompt == chat.prompt_ids(asked)
    behind = chat.decode(trained[len(prompt) + len(target) :])
    assert not behind, "what the template writes behind a reply has no words"


@CASES
def test_a_guards_row_is_the_whole_conversation(kind: str, family: str) -> None:
    chat = chat_of(kind, family)
    form = GuardFormat(chat, "square", 8000)
    end = chat.tokenizer.convert_tokens_to_ids(FAMILIES[family][2])
    exchange = ("Where does a kite fly?", "The kite flies over the hill.")
    for red, verdict, first in ((False, "safe", form.safe_id), (True, "unsafe\nS3", form.unsafe_id)):
        data = SquareRow(0, *exchange, red, ("predictive",) if red else (), "kites")
        (row,) = verdict_rows(chat, [data], "square", 8000)
        text = form._text(*exchange)
        ids, (prompt, cut) = row.input_ids.tolist(), form.prompt(*exchange)
        talk = [user_turn(text[len(form._before) : -len(form._after) or None]), assistant_turn(verdict)]
        whole = chat.encode(chat.template.write(talk, False).rstrip())
        assert ids == (whole[: len(ids)] if ids == whole[: len(ids)] else [*whole, end])
        assert not cut and ids[: len(prompt)] == prompt.tolist() and ids[len(prompt)] == first
        assert row.num_targets == len(ids) - len(prompt) and ids[-1] == end
    assert form.safe_id != form.unsafe_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_leaves_a_last_space_to_the_reply(kind: str) -> None:
    """Of which the tokenizer makes one token with the first word: a row of any other ids never comes in generation."""
    chat = chat_of(kind, "spaced")
    assert chat.prompt([user_turn("The kite")]).text == "## Q: The kite\n\n## A:"
    assert chat.tokenizer.decode(chat.prompt_ids([user_turn("The kite")])).endswith("A:")
    assert chat_of(kind, "falcon").prompt([user_turn("Why?")]).text == "User: Why?\nFalcon:"


def test_a_last_space_that_joins_with_nothing_stays(llama3_bytes_chat: ChatFormat) -> None:
    chat = ChatFormat(llama3_bytes_chat.tokenizer)
    chat.tokenizer.chat_template, before = SPACED, chat.tokenizer.chat_template
    try:
        assert ChatFormat(chat.tokenizer).prompt([user_turn("Why?")]).text.endswith("## A: ")
    finally:
        chat.tokenizer.chat_template = before


def joining(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that joins what ``text`` repeats, and a template whose prompt ends with a line end."""
    core = byte_level()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.train_from_iterator(
        [text] * 9,
        trainers.BpeTrainer(special_tokens=TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = SOLAR
    return made


def test_a_line_end_that_joins_is_counted() -> None:
    """Here no row can have both the conversation's ids and the prompt's."""
    chat = ChatFormat(joining("a\n\nb\n\nc\n\n\n\n"))
    row = chat.training_row([user_turn("Why?"), assistant_turn("\n\nWind")], 100)
    assert chat.num_joined == 1
    assert row.input_ids.tolist() == [*chat.encode("### user:\nWhy?\n\n### assistant:\n\n\nWind"), chat.end_id]
    chat.training_row([user_turn("Why?"), assistant_turn("Wind")], 100)
    assert chat.num_joined == 1


PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ CONTENT }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BROKEN = {
    "parts": "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
    "drops": "{{ '' }}",
    "lowers": "{{ m['content'] | lower }}",
    "repeats": "{{ m['content'] }} {{ m['content'] }}",
    "escapes": "{{ m['content'] | e }}",
    "one line": "{{ m['content'] | replace('\n', ' ') }}",
    "one blank": "{{ m['content'].split() | join(' ') }}",
    "letters": "{% for letter in m['content'] %}{{ letter + ' ' }}{% endfor %}",
    "json": "{{ m['content'] | tojson }}",
    "shortens": "{{ m['content'] | truncate(12) }}",
    "drops questions": "{{ m['content'] if m['role'] == 'assistant' or loop.last else '' }}",
    "drops earlier replies": "{{ m['content'] if m['role'] == 'user' or loop.last else '' }}",
    "drops the last": "{{ '' if loop.last else m['content'] }}",
    "drops thoughts": "{{ m['content'].rpartition('think>')[2] if m['role'] == 'assistant' else m['content'] }}",
    "the first everywhere": "{{ messages[0]['content'] }}",
}


def saved(template: str, folder: Path) -> Path:
    tokenizer("byte level", template).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_does_not_write_every_message_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(PLAIN.replace("{{ CONTENT }}", BROKEN[name]), tmp_path)
    with pytest.raises(
        ModelError, match=r"chat template of .* message \d of a conversation of the roles user.* once, "
    ):
        load_chat(folder, "model.path")
    with pytest.raises(ModelError, match="chat template of"):
        GuardFormat(load_chat(folder, "guard.path"), "square", 4000)


def test_a_template_whose_order_is_another_is_refused(tmp_path: Path) -> None:
    template = PLAIN.replace("in messages", "in messages[::-1]").replace("CONTENT", "m['content']")
    with pytest.raises(ModelError, match="moves message 2"):
        load_chat(saved(template, tmp_path), "judge.path")


@pytest.mark.parametrize("content", ["m['content'] | trim", "m['content'].strip()", "m['content']"])
def test_a_template_that_trims_is_taken(content: str, tmp_path: Path) -> None:
    chat = load_chat(saved(PLAIN.replace("CONTENT", content), tmp_path), "model.path")
    assert "<user>Why?" in chat.render([user_turn("Why?\n ")], reply_follows=True)


def test_what_a_template_cuts_at_is_broken_in_content(tmp_path: Path) -> None:
    """A thinking model's template drops what stands before ``</think>``: text of a row must not."""
    cut = "{{ m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content'] }}"
    chat = load_chat(saved(PLAIN.replace("{{ CONTENT }}", cut), tmp_path), "model.path")
    text = chat.render([user_turn("Why?"), assistant_turn("Up</think>Wind"), user_turn("So?")], reply_follows=True)
    assert "Up< /think>Wind" in text


def test_a_prompt_that_is_no_beginning_of_the_whole_is_refused_where_rows_are_made(tmp_path: Path) -> None:
    folder = saved(
        PLAIN.replace("CONTENT", "m['content']").replace("<assistant>{% endif", "<assistant>Kite: {% endif"), tmp_path
    )
    with pytest.raises(ModelError, match="generation prompt is a prefix"):
        load_chat(folder, "model.path")
    assert load_chat(folder, "judge.path").prompt([user_turn("Why?")]).text.endswith("Kite: ")


@pytest.mark.parametrize(
    "of_reply", ["", "<think>", "<think>\n\n</think>"], ids=["DeepSeek R1", "every reply thinks", "Qwen3 Thinking"]
)
def test_a_prompt_that_opens_a_thought_is_refused_where_rows_are_made(of_reply: str, tmp_path: Path) -> None:
    """Rows teach replies without thoughts: in generation such a reply would be a thought that never ends."""
    template = PLAIN.replace("<assistant>{% endif", "<assistant><think>\n{% endif")
    before = f"{{% if m['role'] == 'assistant' and loop.last %}}{of_reply}\n{{% endif %}}" if of_reply else ""
    folder = saved(template.replace("{{ CONTENT }}", before + "{{ m['content'] }}"), tmp_path)
    with pytest.raises(ModelError, match=r"opens a thought .*<think>.*enable_thinking=False"):
        load_chat(folder, "model.path")
    assert load_chat(folder, "judge.path").prompt([user_turn("Why?")]).text.endswith("<think>\n")


def test_a_message_that_is_lost_in_a_run_is_an_error(tmp_path: Path) -> None:
    """A template that drops system messages passes, as most runs have none; a conversation with one does not."""
    template = PLAIN.replace("in messages", "in messages if m['role'] != 'system'").replace("CONTENT", "m['content']")
    chat = load_chat(saved(template, tmp_path), "model.path")
    with pytest.raises(
        ModelError, match="drops, alters or moves message 1 of a conversation of the roles system, user"
    ):
        chat.prompt([{"role": "system", "content": "Be kind."}, user_turn("Why?")])


def test_a_reply_that_would_never_end_is_refused() -> None:
    with pytest.raises(ModelError, match=r"has no eos_token, .* add eos_token to tokenizer_config\.json"):
        ChatFormat(tokenizer("byte level", SOLAR, eos=None))
    made = tokenizer("byte level", SOLAR, eos=None)
    named = ChatFormat(made, made.convert_tokens_to_ids(["<|end|>"]))
    assert named.end_id == named.pad_id == made.convert_tokens_to_ids("<|end|>")
    assert ChatFormat(tokenizer("byte level", CHATML, eos=None)).end_ids == {made.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_s_trial_counts_no_row() -> None:
    """The tokenizer joins the prompt's line end with the trial's reply, which is no row of a run."""
    chat = ChatFormat(joining(f"\n{PROBES[3][:3]}"))
    chat.check(trains=True)
    assert chat.num_joined == 0 and not chat.notes()
    chat.training_row([user_turn("Why?"), assistant_turn(PROBES[3])], 100)
    assert chat.num_joined == 1
