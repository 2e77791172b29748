"""Two-turn generation and scores, with a stub that echoes what it was shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import pytest

from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.intervals import Mean
from fedsim.evaluate.mt_bench import MtBench, MtMeans, mean_scores

CATEGORIES = ["writing", "math", "stem", "math", "kites"]


def question(index: int, category: str) -> MtQuestion:
    """A question whose record says what it is worth."""
    turns = (f"First {index}?", f"Second {index}?")
    record = {"question_id": 81 + index, "category": category, "turns": list(turns), "worth": index}
    return MtQuestion(81 + index, category, turns, None, record)


Measure = Callable[..., Result]

QUESTIONS = [question(i, c) for i, c in enumerate(CATEGORIES)]


def echo(conversation: Conversation) -> str:
    """Shows the number of messages and the last one."""
    return f"{len(conversation)}: {conversation[-1]['content']}"


def rubric(record: Mapping[str, Any], turn: int, reply: str) -> float:
    """1 + worth for turn 1, 2 + worth for turn 2; checks that the reply is that turn's."""
    assert reply.endswith(record["turns"][turn - 1])
    return float(turn + record["worth"])


def near(mean: Mean | None) -> Any:
    """Equal to a mean but for the last bits."""
    assert mean is not None
    return pytest.approx(astuple(mean), rel=1e-12)


def test_turn_two_sees_turn_one(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    engine = stub_engine(chat, reply=echo)
    result = measure(engine, MtBench(50), QUESTIONS, ("eval", 1))
    assert [tuple(r.text for r in a.replies) for a in result.answers] == [
        (f"1: First {i}?", f"3: Second {i}?") for i in range(5)
    ]
    asked = [c for conversations, _, _ in engine.calls[1::2] for c in conversations]
    expected = [user_turn("First 2?"), assistant_turn("1: First 2?"), user_turn("Second 2?")]
    assert len(asked) == 5 and expected in asked
    assert [a.question for a in result.answers] == QUESTIONS


def test_temperatures_are_fastchats(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    """math 0, stem 0.1, writing 0.7, anything unknown 0.7; every call has its own key and the length asked for."""
    engine = stub_engine(chat, reply=echo)
    measure(engine, MtBench(50), QUESTIONS, ("eval", 1))
    sizes = [(sampling.temperature, len(conversations)) for conversations, sampling, _ in engine.calls]
    assert sizes == [(0.0, 2)] * 2 + [(0.1, 1)] * 2 + [(0.7, 2)] * 2
    assert len({key for _, _, key in engine.calls}) == 6
    assert all(key[:2] == ("eval", 1) and sampling.max_new_tokens == 50 for _, sampling, key in engine.calls)


def test_scores(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    result = measure(stub_engine(chat, reply=echo), MtBench(50, rubric), QUESTIONS)
    assert [a.scores for a in result.answers] == [(1.0 + i, 2.0 + i) for i in range(5)]
    means = mean_scores(QUESTIONS, [a.scores for a in result.answers])
    assert result.figures["mt_bench"] == means.score
    assert near(means.score) == astuple(Mean.of([1.5, 2.5, 3.5, 4.5, 5.5]))  # over questions: their turns are related
    assert near(means.by_turn[0]) == astuple(Mean.of([1, 2, 3, 4, 5]))
    assert near(means.by_turn[1]) == astuple(Mean.of([2, 3, 4, 5, 6]))
    assert {name: mean.value for name, mean in means.by_category.items()} == {
        "writing": 1.5,
        "math": 3.5,
        "stem": 3.5,
        "kites": 5.5,
    }
    assert near(means.by_category["math"]) == astuple(Mean.of([2.5, 4.5]))


def test_without_a_rubric_there_is_no_score(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    result = measure(stub_engine(chat, reply=echo), MtBench(50), QUESTIONS)
    assert mean_scores(QUESTIONS, [a.scores for a in result.answers]) == MtMeans(None, (None, None), {})
    assert "mt_bench" not in result.figures and not result.items
    assert all(a.scores == (None, None) for a in result.answers)
    assert len(result.replies) == 10
    assert result.answers[3].texts == (QUESTIONS[3], ("1: First 3?", "3: Second 3?"))


def test_a_turn_without_a_score_is_left_out_of_the_means() -> None:
    """Each rated turn counts once, as in FastChat's show_result; a question without any is not counted."""
    scores = [(8.0, None), (2.0, 4.0), (None, 6.0), (None, None), (5.0, None)]
    means = mean_scores(QUESTIONS, scores)
    assert means.score is not None and means.score.value == 25 / 5 and means.score.count == 4
    assert means.score == Mean.of_groups([[8], [2, 4], [6], [5]])
    assert [near(mean) for mean in means.by_turn] == [astuple(Mean.of([8, 2, 5])), astuple(Mean.of([4, 6]))]
    assert means.by_category == {
        "writing": Mean.of([8]),
        "math": Mean.of([3]),
        "stem": Mean.of([6]),
        "kites": Mean.of([5]),
    }
    assert mean_scores(QUESTIONS[:1], [(None, 3.0)]).by_turn == (None, Mean.of([3.0]))


def test_a_rubric_must_stay_between_1_and_10(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    for bad in (0.5, 10.5):
        with pytest.raises(AssertionError, match="1 to 10"):
            measure(stub_engine(chat, reply=echo), MtBench(50, lambda r, t, s, v=bad: v), QUESTIONS)
