"""MT-Bench: two-turn answers, and the means of their scores from a deterministic rubric or a judge.

Turn 2 sees turn 1's answer; temperatures per category are FastChat's (``fastchat/llm_judge/common.py``). Without a
rubric or a judge the score is absent: it is never invented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedsim import keys
from fedsim.data.benchmarks import MtQuestion
from fedsim.data.chat import user_turn
from fedsim.evaluate.asking import Asking
from fedsim.evaluate.collapse import measure_collapse
from fedsim.evaluate.intervals import Mean
from fedsim.evaluate.measures import Items, Metrics, collapse_metrics
from fedsim.evaluate.rows import subset
from fedsim.generate.engine import Dialogues, Replies, Reply, Sampling

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

TurnScores = tuple[float | None, float | None]
"""Scores from 1 to 10 of a question's two answers; None for an answer without one."""

UNSCORED: Final[TurnScores] = (None, None)


@dataclass(frozen=True)
class MtAnswer:
    """One question's two answers and their scores."""

    question: MtQuestion
    replies: tuple[Reply, Reply] = field(repr=False)
    scores: TurnScores = UNSCORED


@dataclass(frozen=True)
class MtMeans:
    """Means of the scores that there are, as FastChat's show_result takes them: each rated turn counts once.

    The two turns of a question depend on each other, so that intervals take only the questions as independent, and
    counts are of questions with a score. A question with one rated turn counts half as much as one with two.

    Attributes:
        score: over both turns; None where nothing is scored.
        by_turn: over turn 1 and over turn 2; None where none of the turn is scored.
        by_category: over both turns of the category's questions; a category without a score is left out.
    """

    score: Mean | None
    by_turn: tuple[Mean | None, Mean | None]
    by_category: dict[str, Mean]

    def metrics(self) -> Metrics:
        """``eval/mt_bench``, ``eval/mt_bench_turn_1`` and so on: value, interval and count of each mean."""
        named = {"eval/mt_bench": self.score}
        named |= {f"eval/mt_bench_turn_{turn}": mean for turn, mean in enumerate(self.by_turn, start=1)}
        named |= {f"eval/mt_bench_category_{category}": mean for category, mean in self.by_category.items()}
        return {key: v for name, mean in named.items() if mean is not None for key, v in _named(name, mean).items()}


@dataclass(frozen=True)
class MtResult:
    """Outcome over all questions: their answers, in the order of the questions, and the means of the scores."""

    answers: list[MtAnswer] = field(repr=False)
    means: MtMeans

    @property
    def replies(self) -> list[Reply]:
        """All replies: both turns of each question."""
        return [reply for answer in self.answers for reply in answer.replies]

    @property
    def texts(self) -> list[tuple[MtQuestion, tuple[str, str]]]:
        """Each question with its two answers, as a judge takes them."""
        return [(a.question, (a.replies[0].text, a.replies[1].text)) for a in self.answers]

    def metrics(self) -> Metrics:
        """The means, and how many replies were cut or went astray."""
        metrics: Metrics = {"eval/mt_bench_questions": len(self.answers)}
        metrics |= self.means.metrics()
        metrics["eval/mt_bench_truncated"] = sum(r.truncated for r in self.replies)
        metrics["eval/mt_bench_prompts_truncated"] = sum(r.prompt_truncated for r in self.replies)
        return metrics | collapse_metrics("eval/mt_bench", measure_collapse([r.text for r in self.replies]))

    def items(self) -> Items:
        """Points for each question: ``mt_bench_turn_1``, ``mt_bench_turn_2`` and their mean ``mt_bench``.

        A rubric scores every answer. Where a score is missing there are no items of that figure.
        """
        first, second = (_complete([answer.scores[turn] for answer in self.answers]) for turn in (0, 1))
        named = {"mt_bench_turn_1": first, "mt_bench_turn_2": second}
        if first is not None and second is not None:
            named["mt_bench"] = [(one + two) / 2 for one, two in zip(first, second, strict=True)]
        return {name: points for name, points in named.items() if points is not None}


def _complete(scores: Sequence[float | None]) -> list[float] | None:
    found = [score for score in scores if score is not None]
    return found if len(found) == len(scores) else None


def ask_mt_bench(
    questions: Sequence[MtQuestion],
    max_new_tokens: int,
    key: Sequence[keys.KeyPart],
    *,
    limit: int = 0,
    rubric: Rubric | None = None,
) -> Asking[MtResult]:
    """Ask both turns of every question and score the answers.

    Args:
        questions: at least one.
        max_new_tokens: for each turn; MT-Bench's is 1,024.
        key: names the draws, with turn, temperature and place among the questions of that temperature.
        limit: ask only so many questions (:func:`subset`); 0 asks all.
        rubric: scores a reply from the question's record alone.
    """
    chosen = subset(questions, limit)
    places = _places_by_temperature(chosen)

    def conclude(found: list[Replies]) -> MtResult:
        pairs: dict[int, tuple[Reply, Reply]] = {}
        for where, (first, second) in zip(places.values(), found, strict=True):
            pairs.update(zip(where, zip(first, second, strict=True), strict=True))
        return summarise_answers(
            [
                MtAnswer(question, pairs[i], UNSCORED if rubric is None else _scores(rubric, question, pairs[i]))
                for i, question in enumerate(chosen)
            ]
        )

    dialogues = [
        Dialogues(
            [[user_turn(chosen[i].turns[0])] for i in where],
            Sampling(temperature, max_new_tokens),
            [(*key, "turn", turn, "temperature", str(temperature)) for turn in (1, 2)],
            [[chosen[i].turns[1] for i in where]],
        )
        for temperature, where in places.items()
    ]
    return Asking(dialogues, conclude)


def summarise_answers(answers: list[MtAnswer]) -> MtResult:
    """The answers with the means of their scores."""
    return MtResult(answers, mean_scores([a.question for a in answers], [a.scores for a in answers]))


def mean_scores(questions: Sequence[MtQuestion], scores: Sequence[TurnScores]) -> MtMeans:
    """Means over the scores of ``questions`` (same order)."""
    rated = [[s for s in pair if s is not None] for pair in scores]
    categories: dict[str, list[list[float]]] = {}
    for question, values in zip(questions, rated, strict=True):
        categories.setdefault(question.category, []).append(values)
    first, second = (_mean([[pair[turn]] for pair in scores if pair[turn] is not None]) for turn in (0, 1))
    by_category = {name: mean for name, groups in categories.items() if (mean := _mean(groups)) is not None}
    return MtMeans(_mean(rated), (first, second), by_category)


def _mean(groups: Sequence[Sequence[float | None]]) -> Mean | None:
    """Mean over all numbers of the groups that have any."""
    filled = [[v for v in group if v is not None] for group in groups if group]
    return Mean.of_groups(filled) if filled else None


def _named(name: str, mean: Mean) -> Metrics:
    """A mean of scores. Student's interval knows no scale and is cut to it; scores that are all alike give none."""
    low, high = max(mean.low, SCALE[0]), min(mean.high, SCALE[1])
    interval: Metrics = {f"{name}_low": low, f"{name}_high": high} if mean.low < mean.high else {}
    return {name: mean.value, **interval, f"{name}_count": mean.count}


def _places_by_temperature(questions: Sequence[MtQuestion]) -> dict[float, list[int]]:
    """Places of the questions that are answered at each temperature, ascending."""
    temperatures = [TEMPERATURES.get(q.category, DEFAULT_TEMPERATURE) for q in questions]
    return {t: [i for i, other in enumerate(temperatures) if other == t] for t in sorted(set(temperatures))}


def _scores(rubric: Rubric, question: MtQuestion, replies: tuple[Reply, Reply]) -> TurnScores:
    first, second = (float(rubric(question.record, turn, reply.text)) for turn, reply in enumerate(replies, start=1))
    assert min(first, second) >= SCALE[0] and max(first, second) <= SCALE[1], "a rubric scores from 1 to 10"
    return first, second
