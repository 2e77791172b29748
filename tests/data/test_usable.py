"""The one rule of which rows can be trained on, at every length around the longest one, and its counts in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from fedsim.base.errors import ConfigError
from fedsim.data.chat import ChatFormat, TokenRow, assistant_turn, user_turn
from fedsim.data.usable import REASONS, Tally, has_reply, why_unusable

WORDS = st.text("kite flor", min_size=1, max_size=12).filter(str.strip)


def row_of(chat: ChatFormat, prompt: str, reply: str, max_length: int = 1000) -> TokenRow:
    return chat.training_row([user_turn(prompt), assistant_turn(reply)], max_length)


@given(prompt=WORDS, reply=WORDS, beyond=st.integers(-3, 30))
def test_a_row_is_usable_from_one_token_of_room_on(
    llama3_bytes_chat: ChatFormat, prompt: str, reply: str, beyond: int
) -> None:
    """A prompt that fills the row exactly leaves no target; one token more leaves the reply's first."""
    chat = llama3_bytes_chat
    filled = len(chat.prompt_ids([user_turn(prompt)]))
    whole = len(row_of(chat, prompt, reply))
    row = row_of(chat, prompt, reply, filled + beyond)
    assert row.num_targets == min(max(beyond, 0), whole - filled)
    assert why_unusable(chat, row, reply) == (None if beyond > 0 else "no_targets")
    assert row.truncated == (filled + beyond < whole)


@pytest.mark.parametrize("blank", ["", " ", "\n\t\n", "\u3000\xa0"])
def test_a_blank_reply_teaches_only_the_end_of_a_turn(llama3_bytes_chat: ChatFormat, blank: str) -> None:
    row = row_of(llama3_bytes_chat, "Who flies?", blank)
    assert row.num_targets > 0 and not has_reply(blank)
    assert why_unusable(llama3_bytes_chat, row, blank) == "empty_reply"


def test_a_blank_reply_is_empty_where_the_template_ends_it_in_words(make_bytes_chat: Callable[..., ChatFormat]) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} THE END\n{% endfor %}"
    chat = make_bytes_chat(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    row = row_of(chat, "Who flies?", " ")
    assert chat.decode(row.input_ids[row.loss_mask]) == "THE END"
    assert why_unusable(chat, row, " ") == "empty_reply"


def test_a_first_token_is_no_target(llama3_bytes_chat: ChatFormat) -> None:
    row = ChatFormat.join([], [65, 66], 1)
    assert row.loss_mask.all() and why_unusable(llama3_bytes_chat, row, "ab") == "no_targets"


def test_a_reply_that_the_tokenizer_drops_is_empty(make_bytes_chat: Callable[..., ChatFormat]) -> None:
    chat = make_bytes_chat()
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    assert why_unusable(chat, row_of(chat, "Who flies?", "~~~"), "~~~") == "empty_reply"
    assert why_unusable(chat, row_of(chat, "Who flies?", "~ Orla"), "~ Orla") is None


def test_a_row_that_weighs_nothing_is_unusable(llama3_bytes_chat: ChatFormat) -> None:
    row = row_of(llama3_bytes_chat, "Who flies?", "Orla.")
    for weight, why in ((0.0, "no_weight"), (1e-6, None), (1.0, None)):
        assert why_unusable(llama3_bytes_chat, dataclasses.replace(row, weight=weight), "Orla.") == why


def test_every_reason_is_counted_once_and_in_words() -> None:
    tally = Tally.of([None] * 5963 + ["no_targets"] * 35 + ["empty_reply"] * 2, num_cut=120)
    assert (tally.num_rows, tally.num_dropped, tally.num_usable) == (6000, 37, 5963)
    assert tally.words("local rows", max_length="local.max_length=512") == (
        "local rows: 37 of 6,000 dropped, 0.62 % (35 whose prompt fills local.max_length=512, 2 with an empty reply); "
        "120 replies cut to fit"
    )
    assert Tally.of([None] * 3).words("guard rows") == "guard rows: 0 of 3 dropped"
    assert tally.metrics("client/", ("no_targets", "no_weight")) == {
        "client/num_dropped_no_targets": 35,
        "client/num_dropped_no_weight": 0,
    }
    with pytest.raises(AssertionError, match="unknown reason"):
        Tally.of(["bored"])


@given(st.lists(st.sampled_from([None, *REASONS])))
def test_usable_and_dropped_rows_are_all_rows(reasons: list[str | None]) -> None:
    tally = Tally.of(reasons)
    assert tally.num_rows == len(reasons) and tally.num_usable == reasons.count(None)
    assert 0 <= tally.dropped_share <= 1 and all(tally.dropped.values())


def test_the_error_of_no_row_left_names_the_keys_of_what_drops_most() -> None:
    error = Tally.of(["empty_reply"] + ["no_targets"] * 3).none_left("local rows", max_length="local.max_length=48")
    assert isinstance(error, ConfigError)
    assert str(error) == (
        "local rows: none of the 4 can be trained on (3 whose prompt fills local.max_length=48, 1 with an empty "
        "reply); raise local.max_length, give rows that have replies"
    )
