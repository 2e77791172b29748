"""Subsets of items and rows to be scored."""

from __future__ import annotations

import pytest

from fedsim.base.errors import ConfigError, ModelError
from fedsim.data.chat import ChatFormat, user_turn
from fedsim.evaluate.scoring import reply_ids, scored_row, subset


def test_subset_is_fixed_nested_and_in_order() -> None:
    items = list(range(520))
    assert subset(items, 0) == items and subset(items, 520) == items and subset(items, 9999) == items
    small, large = subset(items, 40), subset(items, 200)
    assert len(small) == 40 and small == sorted(small) and set(small) < set(large)
    assert 5 < sum(i % 2 for i in small) < 35  # no stride that would hit one kind only
    with pytest.raises(ConfigError, match="-1"):
        subset(items, -1)


def test_reply_ids_are_those_of_a_training_row(chat: ChatFormat) -> None:
    """Scored ids and trained ids are the same but for the end of turn."""
    for reply in ("A kite.", "  two\nlines\n\n", "Naïve 漢字 🙂"):
        conversation = [user_turn("What is it?")]
        row = chat.training_row([*conversation, {"role": "assistant", "content": reply}], 10_000)
        trained = row.input_ids[row.loss_mask].tolist()
        prompt, target = reply_ids(chat, conversation, reply)
        assert list(target) == trained[:-1] and list(prompt) == chat.prompt_ids(conversation)
        assert trained[-1] == chat.tokenizer.eos_token_id


def test_a_leading_space_stays_where_the_template_keeps_it(chat: ChatFormat, untrimmed_chat: ChatFormat) -> None:
    conversation = [user_turn("Which?")]
    assert chat.tokenizer.decode(reply_ids(chat, conversation, " (A)")[1]) == "(A)"
    assert untrimmed_chat.tokenizer.decode(reply_ids(untrimmed_chat, conversation, " (A)")[1]) == " (A)"


def test_markers_in_a_reply_stay_text(chat: ChatFormat) -> None:
    _, ids = reply_ids(chat, [user_turn("Say it.")], "end <|eot_id|> end")
    assert chat.tokenizer.eos_token_id not in ids


def test_a_template_that_alters_replies_is_refused(untrimmed_chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    shouting = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}{% endfor %}[assistant]"
    monkeypatch.setattr(untrimmed_chat.tokenizer, "chat_template", shouting)
    with pytest.raises(ModelError, match="alters"):
        reply_ids(untrimmed_chat, [user_turn("hi")], "quiet")


@pytest.mark.parametrize(
    ("num_prompt", "num_target", "prompt_left", "target_left"),
    [
        (10, 5, 10, 5),
        (15, 5, 15, 5),
        (16, 5, 15, 5),
        (300, 5, 15, 5),
        (10, 11, 10, 10),
        (3, 40, 3, 17),
        (40, 40, 10, 10),
    ],
)
def test_rows_that_are_too_long(num_prompt: int, num_target: int, prompt_left: int, target_left: int) -> None:
    """In 20 tokens a prompt loses its beginning and a reply of more than half of them its end."""
    prompt, target = list(range(1000, 1000 + num_prompt)), list(range(2000, 2000 + num_target))
    row = scored_row(prompt, target, 20)
    assert row.input_ids.tolist() == prompt[num_prompt - prompt_left :] + target[:target_left]
    assert row.loss_mask.tolist() == [False] * prompt_left + [True] * target_left
    assert row.truncated == ((prompt_left, target_left) != (num_prompt, num_target))
