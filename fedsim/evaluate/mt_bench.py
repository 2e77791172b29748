"""MT-Bench: two-turn answers, scored by a deterministic rubric where there is one.

Turn 2 sees turn 1's answer; temperatures per category are FastChat's (``fastchat/llm_judge/common.py``). Without a
rubric the score is absent: it is never invented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedsim import keys
from fedsim.data.benchmarks import MtQuestion
from fedsim.data.chat import Conversation, assistant_turn, user_turn
from fedsim.evaluate.intervals import Mean
from fedsim.evaluate.rows import subset
from fedsim.generate.engine import Engine, Reply, Sampling

TEMPERATURES: Final = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's sampling temperature by category; :data:`DEFAULT_TEMPERATURE` for any other."""

DEFAULT_TEMPERATURE: Final = 0.7

SCALE: Final = (1.0, 10.0)
"""Least and greatest score."""

Rubric = Callable[[Mapping[str, Any], int, str], float]
"""Score from 1 to 10 of (question record, turn 1 or 2, reply)."""


@dataclass(frozen=True)
class MtAnswer:
    """One question's two answers and, where there is a rubric, their scores (1 to 10)."""

    question: MtQuestion
    replies: tuple[Reply, Reply] = field(repr=False)
    scores: tuple[float, float] | None


@dataclass(frozen=True)
class MtResult:
    """Outcome over all questions.

    Attributes:
        answers: in the order of the questions.
        score: mean of the questions' mean scores, 1 to 10, over questions as the two turns depend on each other; None
            without a rubric.
        by_turn: mean score of turn 1 and of turn 2; None without a rubric.
        by_category: mean of the questions' mean scores by category; empty without a rubric.
    """

    answers: list[MtAnswer] = field(repr=False)
    score: Mean | None
    by_turn: tuple[Mean, Mean] | None
    by_category: dict[str, Mean]

    @property
    def replies(self) -> list[Reply]:
        """All replies: both turns of each question."""
        return [reply for answer in self.answers for reply in answer.replies]


def run_mt_bench(
    engine: Engine,
    questions: Sequence[MtQuestion],
    max_new_tokens: int,
    key: Sequence[keys.KeyPart],
    *,
    limit: int = 0,
    rubric: Rubric | None = None,
) -> MtResult:
    """Ask both turns of every question and score the answers.

    Args:
        engine: the model under test.
        questions: at least one.
        max_new_tokens: for each turn; MT-Bench's is 1,024.
        key: names the draws, with turn, temperature and place among the questions of that temperature.
        limit: ask only so many questions (:func:`subset`); 0 asks all.
        rubric: scores a reply from the question's record alone.
    """
    chosen = subset(questions, limit)
    conversations: list[Conversation] = [[user_turn(q.turns[0])] for q in chosen]
    first = _ask(engine, chosen, conversations, max_new_tokens, (*key, "turn", 1))
    for conversation, question, reply in zip(conversations, chosen, first, strict=True):
        conversation += [assistant_turn(reply.text), user_turn(question.turns[1])]
    second = _ask(engine, chosen, conversations, max_new_tokens, (*key, "turn", 2))
    answers = [
        MtAnswer(question, replies, None if rubric is None else _scores(rubric, question, replies))
        for question, replies in zip(chosen, zip(first, second, strict=True), strict=True)
    ]
    return summarise_answers(answers)


def summarise_answers(answers: list[MtAnswer]) -> MtResult:
    """Means of the scores that the answers have (all of them, or none)."""
    scores = [a.scores for a in answers if a.scores is not None]
    if not scores:
        return MtResult(answers, None, None, {})
    assert len(scores) == len(answers), "either every answer has scores or none"
    groups: dict[str, list[float]] = {}
    for answer, (first, second) in zip(answers, scores, strict=True):
        groups.setdefault(answer.question.category, []).append((first + second) / 2)
    return MtResult(
        answers=answers,
        score=Mean.of([(first + second) / 2 for first, second in scores]),
        by_turn=(Mean.of([s[0] for s in scores]), Mean.of([s[1] for s in scores])),
        by_category={name: Mean.of(values) for name, values in groups.items()},
    )


def _ask(
    engine: Engine,
    questions: Sequence[MtQuestion],
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    key: Sequence[keys.KeyPart],
) -> list[Reply]:
    """One reply per conversation, in order; one engine call per temperature."""
    temperatures = [TEMPERATURES.get(q.category, DEFAULT_TEMPERATURE) for q in questions]
    replies: dict[int, Reply] = {}
    for temperature in sorted(set(temperatures)):
        places = [i for i, t in enumerate(temperatures) if t == temperature]
        sampling = Sampling(temperature, max_new_tokens)
        drawn = engine.generate([conversations[i] for i in places], sampling, (*key, "temperature", str(temperature)))
        replies.update(zip(places, drawn, strict=True))
    return [replies[i] for i in range(len(questions))]


def _scores(rubric: Rubric, question: MtQuestion, replies: tuple[Reply, Reply]) -> tuple[float, float]:
    first, second = (float(rubric(question.record, turn, reply.text)) for turn, reply in enumerate(replies, start=1))
    assert min(first, second) >= SCALE[0] and max(first, second) <= SCALE[1], "a rubric scores from 1 to 10"
    return first, second
