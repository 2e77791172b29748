"""Markers of tokenizers and templates: which are found, and that none survives or forms anew inside content."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from fedsim.base.errors import ModelError
from fedsim.data.chat import ChatFormat, assistant_turn, user_turn
from fedsim.data.markers import Markers, token_markers

Make = Callable[..., ChatFormat]

# Templates whose turns are opened by plain text, as the models of these families have them.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m['content'] }}\n"
    "<</SYS>>\n\n{% elif m['role'] == 'user' %}{% if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'system' "
    "%}{{ bos_token }}[INST] {% endif %}{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "Below is an instruction. Answer it: well.\n\n{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n"
    "{{ m['content'] }}\n\n{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% elif m['role'] == 'assistant' %}"
    "ASSISTANT: {{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FAMILIES = {
    "llama2": (LLAMA2, {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}),
    "alpaca": (ALPACA, {"### Instruction:", "### Response:"}),
    "vicuna": (VICUNA, {"USER:", "ASSISTANT:"}),
    "zephyr": (ZEPHYR, {"<|user|>", "<|assistant|>", "<|system|>"}),
}


def plain_chat(make: Make, template: str) -> ChatFormat:
    """A tokenizer that knows no token but the ends of a text."""
    return make(template, ("<s>", "</s>"), "</s>", "<s>", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_that_a_template_writes_as_text_are_found(make_bytes_chat: Make, family: str) -> None:
    template, wanted = FAMILIES[family]
    assert plain_chat(make_bytes_chat, template)._markers.texts == {"<s>", "</s>"} | wanted


def test_words_of_roles_and_system_prompts_are_no_markers(llama3_bytes_chat: ChatFormat, make_bytes_chat: Make) -> None:
    assert llama3_bytes_chat._markers.texts == token_markers(llama3_bytes_chat.tokenizer)
    dated = "{{ bos_token }}Cutting Knowledge Date: December 2023\n" + llama3_bytes_chat.tokenizer.chat_template
    assert make_bytes_chat(dated)._markers.texts == llama3_bytes_chat._markers.texts
    chat = plain_chat(make_bytes_chat, ALPACA)
    text = "Below is an instruction. ### Rules: be kind. The user, the response: all fine.\n[INS]"
    assert chat.defuse(text) == text


WHOLE = sorted(set().union(*(wanted for _, wanted in FAMILIES.values())))
PARTS = [
    "[INST",
    "[/",
    "INST]",
    "<",
    "<<",
    "<|",
    "|>",
    "#",
    "###",
    "Response:",
    "Instruction:",
    "USER",
    "ASSIST",
    "ANT:",
]
PIECES = [*WHOLE, *PARTS, "</s>", "<s>", "user", " ", "\n", ":"]
FRAGMENTS = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=FRAGMENTS, reply=FRAGMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_conversation_has_the_markers_of_its_own_turns_alone(
    make_bytes_chat: Make, family: str, text: str, reply: str
) -> None:
    """At the places where template and content join, too."""
    template, wanted = FAMILIES[family]
    if family not in CHATS:
        CHATS[family] = plain_chat(make_bytes_chat, template)
    chat = CHATS[family]
    written, harmless = (
        chat.render([user_turn(a), assistant_turn(b), user_turn(a)], reply_follows=True)
        for a, b in ((text, reply), ("kite", "kite"))
    )
    for marker in wanted:
        assert written.count(marker) == harmless.count(marker)
    assert chat.defuse(chat.defuse(text)) == chat.defuse(text)


CHATS: dict[str, ChatFormat] = {}


@settings(max_examples=300, deadline=None)
@given(
    markers=st.lists(st.text("<>ab ", min_size=2, max_size=5).filter(lambda m: m == m.strip()), max_size=4),
    text=st.text("<>ab ", max_size=20),
)
def test_no_marker_is_left_or_formed_anew(markers: list[str], text: str) -> None:
    """Overlapping ones, one inside another, and ones with spaces that a break could complete."""
    broken = Markers(markers).break_in(text)
    assert not any(marker in broken for marker in markers if len(marker) > 1)
    assert broken.replace(" ", "") == text.replace(" ", ""), "nothing but spaces is added"


@pytest.mark.parametrize(
    ("markers", "text", "want"),
    [
        (["<|eot|>"], "<|eot_<|eot|>|>", "<|eot_< |eot|>|>"),
        (["|x|"], "|x|x|", "| x| x|"),
        (["###"], "####", "# # ##"),
        (["<a>", "a>b"], "<a>b", "< a >b"),
        (["ab", "a b"], "ab", "a  b"),
        ([], "<a>", "<a>"),
        (["<"], "a < b", "a < b"),
    ],
)
def test_overlapping_markers(markers: list[str], text: str, want: str) -> None:
    assert Markers(markers).break_in(text) == want


def test_an_added_token_that_the_template_writes_is_a_marker_though_it_is_not_special(make_bytes_chat: Make) -> None:
    template = "{% for m in messages %}<U>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    chat = plain_chat(make_bytes_chat, template)
    chat.tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<U>", "<A>", "<table>", "\n\n", "    ")])
    chat = ChatFormat(chat.tokenizer)
    assert chat._tokens.texts == {"<s>", "</s>", "<U>", "<A>"}
    assert chat.defuse_tokens("<U>a<table>\n\n    <A>") == "< U>a<table>\n\n    < A>"


def test_a_template_that_refuses_a_second_turn_is_an_error(make_bytes_chat: Make) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match=r"cannot write a conversation of the roles user, assistant: one turn; use a"):
        plain_chat(make_bytes_chat, template)
