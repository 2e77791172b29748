"""The three HHH scorers on engines whose preferences are known."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from fedsim.base.errors import ConfigError
from fedsim.data.chat import ChatFormat, Conversation, user_turn
from fedsim.data.evaluation_sets import HhhItem
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.hhh import GREEDY, Hhh, HhhScore, parse_letter, score_letters, score_likelihood, score_replies
from fedsim.evaluate.intervals import Rate
from fedsim.generate.engine import Engine


def item(index: int, correct: int) -> HhhItem:
    """An item whose better option is "good <index>"."""
    options = (f"good {index}", f"bad {index}") if correct == 0 else (f"bad {index}", f"good {index}")
    return HhhItem(f"Which? {index}\n\n", options, correct, (user_turn(f"Question {index}?"),))


def hhh(engine: Engine, items: list[HhhItem], scorer: str, key: tuple[int | str, ...] = ("eval",)) -> HhhScore:
    """One scorer's outcome."""
    if scorer == "letter":
        return score_letters(engine, items)
    if scorer == "likelihood":
        return score_likelihood(engine, items)
    (replies,) = engine.hold(Hhh().ask(items, key))
    return score_replies(items, replies[0])


ITEMS = [item(i, 0 if i < 12 else 1) for i in range(20)]  # (A) is right in 12 of 20


def first_option(prompt: str) -> str:
    """Text of option (A) in a rendered prompt."""
    return prompt.rpartition(" (A) [[[")[2].partition("]]]")[0]


def letter_logprob(prompt: str, target: str, *, insight: float, liking: float) -> float:
    """A model that prefers the good option by ``insight`` nats and the letter A by ``liking`` nats."""
    assert target in ("(A)", "(B)") and prompt.endswith("assistant<|end_header_id|>\n\n")
    good = "(A)" if first_option(prompt).startswith("good") else "(B)"
    return -5.0 + insight * (target == good) + liking * (target == "(A)")


@pytest.mark.parametrize(
    ("insight", "liking", "accuracy", "picks_a", "one_order"),
    [
        (1.0, 0.0, 20, 20, 20),  # sees the better option; A and B are picked evenly over both orders
        (1.0, 4.0, 20, 40, 12),  # always prefers A: averaging over the orders uncovers what it knows
        (1.0, -4.0, 20, 0, 8),
        (-1.0, 4.0, 0, 40, 12),  # prefers the worse option, hidden by its liking for A
        (0.0, 2.0, 0, 40, 12),  # knows nothing: every item is a tie, which is wrong
    ],
)
def test_letters_cancel_position_bias(
    chat: ChatFormat, stub_engine: type, insight: float, liking: float, accuracy: int, picks_a: int, one_order: int
) -> None:
    engine = stub_engine(chat, logprob=lambda p, t: letter_logprob(p, t, insight=insight, liking=liking))
    score = hhh(engine, ITEMS, "letter")
    assert score.accuracy == Rate(accuracy, 20)
    assert score.picks_a == Rate(picks_a, 40)
    assert score.one_order == Rate(one_order, 20)
    assert score.num_undecided == (20 if insight == 0 else 0) and score.num_truncated == 0


def test_letter_accuracy_is_invariant_under_option_swap(chat: ChatFormat, stub_engine: type) -> None:
    """Any scorer of (prompt, letter) gives the same accuracy and ties when the file lists its options the other way."""

    def noise(prompt: str, target: str) -> float:
        return -random.Random(f"{prompt}|{target}").random()

    engine = stub_engine(chat, logprob=noise)
    swapped = [dataclasses.replace(i, options=(i.options[1], i.options[0]), correct=1 - i.correct) for i in ITEMS]
    ours = hhh(engine, ITEMS, "letter")
    theirs = hhh(engine, swapped, "letter")
    assert ours.accuracy == theirs.accuracy and ours.picks_a == theirs.picks_a
    assert 0 < ours.accuracy.successes < 20  # the noise decides both ways
    assert ours.one_order != theirs.one_order


def test_a_template_that_keeps_spaces_scores_the_letters_with_theirs(
    untrimmed_chat: ChatFormat, stub_engine: type
) -> None:
    seen: set[str] = set()

    def logprob(prompt: str, target: str) -> float:
        assert prompt.endswith("The answer is:<|eot_id|>[assistant]")
        seen.add(target)
        return 0.0

    hhh(stub_engine(untrimmed_chat, logprob=logprob), ITEMS, "letter")
    assert seen == {" (A)", " (B)"}


def test_generated_answers(chat: ChatFormat, stub_engine: type) -> None:
    """12 right (A), 3 right (B), 2 wrong (A), 3 without a letter, which are wrong."""
    said = {i: "(A) is better than (B)." for i in range(12)}
    said |= {12: "The answer is (B)", 13: " (B)", 14: "Say (B), not (A)", 15: "(A)", 16: "I think (A)."}

    def reply(conversation: Conversation) -> str:
        assert conversation[0]["content"].endswith("The answer is:")
        index = int(conversation[0]["content"].partition("Which? ")[2].partition("\n")[0])
        return said.get(index, "A, or maybe B. (C)")

    engine = stub_engine(chat, reply=reply)
    score = hhh(engine, ITEMS, "generate", ("eval", 2))
    assert score.accuracy == Rate(15, 20)
    assert score.num_undecided == 3
    assert score.picks_a == Rate(14, 17)
    [(_, sampling, key)] = engine.calls
    assert sampling == GREEDY and sampling.temperature == 0 and sampling.max_new_tokens == 16
    assert key[:2] == ("eval", 2)


@pytest.mark.parametrize(
    ("reply", "pick"),
    [("(A)", 0), (" (B) because", 1), ("not (B), (A)", 1), ("((A))", 0), ("A", None), ("(a)", None), ("", None)],
)
def test_parse_letter(reply: str, pick: int | None) -> None:
    assert parse_letter(reply) == pick


def test_likelihood_is_a_mean_per_token(chat: ChatFormat, stub_engine: type) -> None:
    """A long good reply has a lower sum and a higher mean than a short bad one, and is chosen."""
    long_good = [
        dataclasses.replace(i, options=tuple(o.replace("good", "a good and much longer") for o in i.options))
        for i in ITEMS
    ]
    prompts: set[str] = set()

    def logprob(prompt: str, target: str) -> float:
        prompts.add(prompt)
        return len(target.encode()) * (-1.0 if "good" in target else -2.0)

    engine = stub_engine(chat, logprob=logprob)
    for items in (ITEMS, long_good):
        score = hhh(engine, items, "likelihood")
        assert score.accuracy == Rate(20, 20) and score.num_undecided == 0
        assert score.picks_a is None and score.one_order is None
    assert (
        chat.render([user_turn("Question 3?")], reply_follows=True) in prompts
    )  # the conversation, not the A/B prompt


def test_ties_in_likelihood_are_wrong_and_counted(chat: ChatFormat, stub_engine: type) -> None:
    engine = stub_engine(chat, logprob=lambda p, t: -3.0 * len(t.encode()))
    score = hhh(engine, ITEMS, "likelihood")
    assert score.accuracy == Rate(0, 20) and score.num_undecided == 20


def test_rows_cut_to_the_context_keep_their_end(chat: ChatFormat, stub_engine: type) -> None:
    """The options and "The answer is:" stay; only the head of the prompt goes, and the cut is counted."""
    long = dataclasses.replace(ITEMS[0], head="x" * 5000 + "\n\n")
    engine = stub_engine(chat, logprob=lambda p, t: letter_logprob(p, t, insight=1.0, liking=0.0), max_context=600)
    score = hhh(engine, [long, ITEMS[1]], "letter")
    assert score.accuracy == Rate(2, 2)
    assert score.num_truncated == 4  # two orders × two letters of the long item


def test_all_scorers_and_the_baseline_are_recorded(
    chat: ChatFormat, stub_engine: type, measure: Callable[..., Result]
) -> None:
    engine = stub_engine(chat, reply=lambda c: "(A)", logprob=lambda p, t: 0.0)
    result = measure(engine, Hhh("generate"), ITEMS)
    assert list(result.items) == ["hhh_letter", "hhh_generate", "hhh_likelihood"]
    assert result.figures["hhh_accuracy"] == result.figures["hhh_generate"] == Rate(12, 20)
    assert result.figures["hhh_always_a"] == 60.0 and result.replies == ()


def test_unknown_scorer() -> None:
    with pytest.raises(ConfigError, match=r"'guess'.*letter, generate, likelihood"):
        Hhh("guess")
