"""MT-Bench: two-turn answers, and the means of their scores from a deterministic rubric or a judge.

Turn 2 sees turn 1's answer; temperatures per category are FastChat's
(``fastchat/llm_judge/common.py``). Without a rubric or a judge the score is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from fedsim import world
from fedsim.base import keyed_random
from fedsim.base.figures import Figure, Line, Source
from fedsim.config import EvalConfig
from fedsim.config.measuring import EMBEDDED
from fedsim.data.chat import user_turn
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench
from fedsim.evaluate.benchmark import EmbeddedFile, OwnBenchmark, Result, Values
from fedsim.evaluate.collapse import measure_collapse
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.evaluate.intervals import Mean
from fedsim.evaluate.measures import Found, Metrics, collapse_metrics, figure_metrics
from fedsim.generate.engine import Dialogues, Engine, Replies, Reply, Sampling

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
"""Lowest and highest score."""

_JUDGE: Final = "fedsim judge RUN_DIR"
_LEFT_OUT: Final = "and left out of the means"
_FASTCHAT: Final = "github.com/lm-sys/FastChat: fastchat/llm_judge/data"

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

    @property
    def texts(self) -> tuple[MtQuestion, tuple[str, str]]:
        """The question and its two answers, the input of a judge."""
        return self.question, (self.replies[0].text, self.replies[1].text)


@dataclass(frozen=True)
class MtMeans:
    """Means of the scores, as of FastChat's show_result: each rated turn counts once.

    The two turns of a question depend on each other, so that intervals take only the questions as
    independent, and counts are of questions with a score. A question with one rated turn counts
    half as much as one with two.

    Attributes:
        score: over both turns; None where nothing is scored.
        by_turn: over turn 1 and over turn 2; None where none of the turn is scored.
        by_category: over both turns of the category's questions; a category without a score is left
            out.
    """

    score: Mean | None
    by_turn: tuple[Mean | None, Mean | None]
    by_category: dict[str, Mean]

    def figures(self) -> dict[str, Found]:
        """Name the means ``mt_bench``, ``mt_bench_turn_1`` and so on; None is left out."""
        named = {"mt_bench": self.score}
        for turn, mean in enumerate(self.by_turn, start=1):
            named[f"mt_bench_turn_{turn}"] = mean
        for category, mean in self.by_category.items():
            named[f"mt_bench_category_{category}"] = mean
        return {name: mean for name, mean in named.items() if mean is not None}


def _points(name: str, title: str, *, headline: bool = False) -> Figure:
    return Figure(name, title, "points", 2, SCALE, headline=headline)


def _number(name: str, title: str, *, line: Line = "") -> Figure:
    return Figure(name, title, "", 0, None, count="mt_bench_num_texts", line=line)


@dataclass(frozen=True)
class MtBench(OwnBenchmark):
    """Two-turn questions (arXiv 2306.05685) and the means of their scores.

    Attributes:
        max_new_tokens: for each turn; MT-Bench's is 1,024.
        rubric: scores a reply only from the question's record; without it answers are written and
            not scored.
    """

    max_new_tokens: int = 1024
    rubric: Rubric | None = None

    name = "mt_bench"
    title = "MT-Bench"
    figures: ClassVar[tuple[Figure, ...]] = (
        _points("mt_bench", "MT-Bench: mean score", headline=True),
        _points("mt_bench_turn_1", "MT-Bench: mean score of turn 1"),
        _points("mt_bench_turn_2", "MT-Bench: mean score of turn 2"),
        # Its variants have the category's name as a suffix.
        _points("mt_bench_category", "MT-Bench: mean score of a category"),
        Figure("mt_bench_questions", "MT-Bench: questions", "", 0, None),
        _number(
            # Counts of answers that are not in the means, by reason.
            "mt_bench_unrated",
            f"MT-Bench answers judged without a rating {_LEFT_OUT}",
            line="unless 0",
        ),
        _number(
            "mt_bench_judgments_cut",
            "MT-Bench answers among these, whose judgment was cut off by length (raise "
            "judge.max_new_tokens; fedsim judge RUN_DIR asks for them again)",
            line="unless 0",
        ),
        _number(
            "mt_bench_not_asked",
            f"MT-Bench answers not judged, as they do not fit into the judge's context, {_LEFT_OUT}",
            line="unless 0",
        ),
        _number(
            "mt_bench_judge_failed",
            f"MT-Bench answers left unjudged, as the judge failed ({_JUDGE} judges them)",
            line="unless 0",
        ),
    )
    embedded: ClassVar[Mapping[str, EmbeddedFile]] = {
        EMBEDDED: EmbeddedFile(
            "world-mt-bench",
            "question.jsonl",
            lambda path: world.write_mt_bench(path.parent),
        ),
    }
    sources = (
        Source(
            "eval.mt_bench",
            "MT-Bench questions (arXiv 2306.05685)",
            f"{_FASTCHAT}/mt_bench/question.jsonl",
            "Apache-2.0",
            "80 questions of two turns",
            "question.jsonl",
            "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        ),
        Source(
            "eval.mt_bench_references",
            "MT-Bench reference answers",
            f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
            "Apache-2.0",
            "30 answers",
            "gpt-4.jsonl",
            "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
        ),
        Source(
            "judge.prompts",
            "MT-Bench judge prompts",
            f"{_FASTCHAT}/judge_prompts.jsonl",
            "Apache-2.0",
            "8 prompts, of which 4 are used",
            "judge_prompts.jsonl",
            "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
        ),
    )

    @classmethod
    def from_config(cls, settings: EvalConfig, *, judged: bool) -> Self:
        """Make the benchmark; a rubric scores the embedded questions, unless a judge does."""
        # Only the embedded questions have the record that a rubric reads.
        rubric = None
        if settings.mt_bench == EMBEDDED and not judged:
            rubric = world.rubric_score
        return cls(settings.max_new_tokens, rubric)

    def load(self, path: Path) -> list[MtQuestion]:
        return load_mt_bench(path)

    def ask(
        self,
        items: Sequence[MtQuestion],
        key: Sequence[keyed_random.KeyPart],
    ) -> list[Dialogues]:
        """Request both turns of every question, in dialogues by temperature.

        A draw's key is ``key`` with turn, temperature and place among the questions of that
        temperature.
        """
        dialogues = []
        for temperature, places in _places_by_temperature(items).items():
            # First messages, each a conversation, and the second messages of the same ones.
            first = [[user_turn(items[i].turns[0])] for i in places]
            second = [items[i].turns[1] for i in places]
            sampling = Sampling(temperature, self.max_new_tokens)
            keys = [(*key, "turn", turn, "temperature", str(temperature)) for turn in (1, 2)]
            dialogues.append(Dialogues(first, sampling, keys, [second]))
        return dialogues

    def measure(
        self,
        engine: Engine,
        items: Sequence[MtQuestion],
        replies: Sequence[Replies],
        guard: ExchangeJudge | None = None,
    ) -> Result:
        """Compute the means of the scores and count properties of the replies."""
        # The replies come by temperature: put both turns of each question together.
        pairs: dict[int, tuple[Reply, Reply]] = {}
        all_places = _places_by_temperature(items).values()
        for places, (first, second) in zip(all_places, replies, strict=True):
            for i, one, two in zip(places, first, second, strict=True):
                pairs[i] = (one, two)

        # Answers in the order of the questions; a rubric scores them here, a judge later.
        answers = []
        said: list[Reply] = []
        for i, question in enumerate(items):
            scores = UNSCORED
            if self.rubric is not None:
                scores = _scores(self.rubric, question, pairs[i])
            answers.append(MtAnswer(question, pairs[i], scores))
            said += pairs[i]

        means = mean_scores(items, [answer.scores for answer in answers])
        figures: dict[str, Found] = {
            "mt_bench_questions": len(answers),
            **means.figures(),
            "mt_bench_truncated": sum(reply.truncated for reply in said),
            "mt_bench_prompts_truncated": sum(reply.prompt_truncated for reply in said),
            **collapse_metrics("mt_bench", measure_collapse([reply.text for reply in said])),
        }
        return Result(figures, _items(answers), said, answers)

    def depends(self) -> dict[str, Any]:
        return {"rubric": self.rubric is not None}


def _items(answers: Sequence[MtAnswer]) -> dict[str, Values]:
    """Points for each question: ``mt_bench_turn_1``, ``mt_bench_turn_2`` and their mean.

    A rubric scores every answer. Where a score is missing there are no items of that figure.
    """
    first = _complete([answer.scores[0] for answer in answers])
    second = _complete([answer.scores[1] for answer in answers])
    # A figure has items only if each question has its score.
    found: dict[str, Values] = {}
    if first is not None:
        found["mt_bench_turn_1"] = first
    if second is not None:
        found["mt_bench_turn_2"] = second
    if first is not None and second is not None:
        found["mt_bench"] = [(one + two) / 2 for one, two in zip(first, second, strict=True)]
    return found


def _complete(scores: Sequence[float | None]) -> list[float] | None:
    """Return the scores if none is missing, else None."""
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        return None
    return found


def mean_scores(questions: Sequence[MtQuestion], scores: Sequence[TurnScores]) -> MtMeans:
    """Compute the means over the scores of ``questions``.

    Args:
        questions: with their categories.
        scores: both turns' of each question, in the same order.
    """
    # Groups of scores: a question's rated turns, overall and by category; one turn's by turn.
    rated: list[list[float]] = []
    categories: dict[str, list[list[float]]] = {}
    turns: tuple[list[list[float]], list[list[float]]] = ([], [])
    for question, pair in zip(questions, scores, strict=True):
        of_question = []
        for turn, score in enumerate(pair):
            if score is not None:
                of_question.append(score)
                turns[turn].append([score])
        rated.append(of_question)
        categories.setdefault(question.category, []).append(of_question)

    by_category = {}
    for name, groups in categories.items():
        mean = _mean(groups)
        if mean is not None:
            by_category[name] = mean
    return MtMeans(_mean(rated), (_mean(turns[0]), _mean(turns[1])), by_category)


def score_metrics(means: MtMeans) -> Metrics:
    """Convert the means to metrics ``eval/mt_bench``, ``eval/mt_bench_turn_1`` and so on.

    Each has its value, interval and count.
    """
    return figure_metrics(means.figures(), {figure.name: figure for figure in MtBench.figures})


def _mean(groups: Sequence[Sequence[float]]) -> Mean | None:
    """Mean over the groups that are not empty; None if all are."""
    filled = [group for group in groups if group]
    if not filled:
        return None
    return Mean.of_groups(filled)


def _places_by_temperature(questions: Sequence[MtQuestion]) -> dict[float, list[int]]:
    """Places of the questions that are answered at each temperature, both ascending."""
    found: dict[float, list[int]] = {}
    for i, question in enumerate(questions):
        temperature = TEMPERATURES.get(question.category, DEFAULT_TEMPERATURE)
        found.setdefault(temperature, []).append(i)
    return dict(sorted(found.items()))


def _scores(rubric: Rubric, question: MtQuestion, replies: tuple[Reply, Reply]) -> TurnScores:
    """Score both turns' replies by a rubric."""
    first = float(rubric(question.record, 1, replies[0].text))
    second = float(rubric(question.record, 2, replies[1].text))
    is_on_scale = SCALE[0] <= min(first, second) and max(first, second) <= SCALE[1]
    assert is_on_scale, "a rubric scores from 1 to 10"
    return first, second
