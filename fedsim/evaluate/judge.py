"""Rating of MT-Bench answers by a judge; each judgment is written to the file at once.

A judgment that the file already holds is reused where judge, model, question, turn and the whole
text that the judge was shown (answers and reference are in it) are the same. The system message and
``judge.max_new_tokens`` are not in FastChat's rows: after changing one of them remove the file to
have all answers rated again. A judgment that was cut off by length is never reused: it has no
rating, is counted, and is asked for again by the next attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsim.base.errors import JudgeError
from fedsim.base.ranks import Ranks
from fedsim.config import Config
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.fastchat import (
    CUT,
    FAILED,
    NOT_ASKED,
    UNRATED,
    JudgmentFile,
    Place,
    Row,
    judgment_row,
    pending,
)
from fedsim.evaluate.judge_contract import Outcome, Report, Work
from fedsim.evaluate.judge_inputs import (
    KEY,
    build_judge,
    judge_name,
    load_prompts,
    load_questions,
    load_references,
)
from fedsim.evaluate.judge_prompts import Match, make_matches, parse_rating
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.mt_bench import TurnScores, mean_scores, score_metrics


@dataclass(frozen=True)
class Judged:
    """A judge's ratings of one model's answers.

    Attributes:
        judge: its name.
        scores: of every question, in order; all without a score unless ``complete``.
        num_unrated: judgments without a rating, those that were cut off among them.
        num_not_asked: turns for which a local judge's context has no room.
        num_unjudged: turns without a judgment because the judge failed.
        complete: every turn was tried, so that the scores are of all that could be judged.
        error: reason why some were left unjudged; None if none was.
        gave_up: this attempt ended early, as the judge seems to fail for every turn.
        news: remarks for the user on how the judge was asked.
        num_cut: judgments that were cut off by length, in this attempt or an earlier one.
    """

    judge: str
    scores: list[TurnScores]
    num_unrated: int
    num_not_asked: int
    num_unjudged: int
    complete: bool
    error: JudgeError | None
    gave_up: bool = False
    news: tuple[str, ...] = ()
    num_cut: int = 0


def judge_metrics(judged: Judged, questions: Sequence[MtQuestion]) -> Metrics:
    """Make the figures that a judge adds to an evaluation.

    They are the means of its scores, and the numbers of turns that are not in them.
    """
    counts: Metrics = {
        "eval/mt_bench_unrated": judged.num_unrated,
        "eval/mt_bench_judgments_cut": judged.num_cut,
        "eval/mt_bench_not_asked": judged.num_not_asked,
        "eval/mt_bench_judge_failed": judged.num_unjudged,
    }
    return score_metrics(mean_scores(questions, judged.scores)) | counts


class MtJudge:
    """The judge that a configuration asks for, and the file of its judgments.

    Args:
        config: its ``judge`` part, the question file and the references.
        ranks: rank 0 asks an endpoint; all ranks share the work of a local model and of a user's
            judge.
        device: of this rank.

    Raises:
        ConfigError, DataError: see :func:`fedsim.evaluate.judge_inputs.check_judge`.

    Attributes:
        name: of the judge, in FastChat's files.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device) -> None:
        assert config.judge.is_on, "there is no judge"
        self.config = config
        self.ranks = ranks
        self.device = device
        self.questions = load_questions(config)
        self.prompts = load_prompts(config)
        self.references = load_references(config, self.questions)
        self._judge = build_judge(config)
        # The name may be a digest of a user's file, which rank 0 reads.
        self.name: str = ranks.once(lambda: judge_name(config, self._judge))

    @property
    def unit(self) -> str:
        """Unit of progress: turns, or a local model's rows on this rank."""
        return self._judge.unit

    def judge(
        self,
        folder: Path,
        model_id: str,
        answered: Sequence[tuple[MtQuestion, tuple[str, str]]],
        report: Report | None = None,
    ) -> Judged:
        """Judge both turns of ``answered``; the result is the same on every rank.

        Args:
            folder: FastChat's ``data/mt_bench``: judgments are in ``model_judgment`` there.
            model_id: FastChat's name of the model.
            answered: questions with the answers to both turns, all of one model.
            report: called with the progress, in :attr:`unit`; None for no reports.
        """
        name = self.name
        file = JudgmentFile(folder, name)
        matches = make_matches(self.prompts, answered, self.references)
        holds = _holds(name, matches)

        # Step 1: whole judgments of the file are reused; their scores are read again.
        found = self.ranks.once(lambda: file.merge(model_id, {}, holds))
        held: dict[Place, Row] = {}
        for place, row in found.items():
            if not pending(row):
                held[place] = {**row, "score": parse_rating(row["judgment"])}
        wanted = [i for i, match in enumerate(matches) if match.place not in held]
        # Turns that were never tried come first, so that each is tried at last.
        wanted.sort(key=lambda i: matches[i].place in found)

        def keep(match: Match, judgment: str | None) -> None:
            # A failed turn is a row too, with FastChat's mark of an error.
            text = judgment
            if text is None:
                text = FAILED
            row = judgment_row(
                match.question_id,
                model_id,
                (name, match.prompt_name),
                match.user,
                text,
                parse_rating(text),
                match.turn,
                time.time(),
            )
            file.append(row)
            held[match.place] = row

        # Step 2: ask for the others; each judgment is appended to the file as it arrives.
        outcome = Outcome()
        if wanted:
            work = Work(matches, wanted, self.ranks, self.device, keep, report)
            outcome = self._judge.judge_all(work, f"{KEY}={self.config.judge.kind!r}")

        # Step 3: merge with the judgments that another process has appended meanwhile.
        rows = self.ranks.once(lambda: file.merge(model_id, held, holds))
        return _summary(name, answered, rows, outcome, self.config.judge.max_new_tokens)


def _holds(judge: str, matches: Sequence[Match]) -> Callable[[Row], bool]:
    """Make the predicate of a valid row: judge, prompt and text shown are those of a match."""
    asked = {match.place: match for match in matches}

    def holds(row: Row) -> bool:
        # The question and turn are asked, by the same judge with the same text.
        match = asked.get((row["question_id"], row["turn"]))
        if match is None or row["judge"] != [judge, match.prompt_name]:
            return False
        return bool(row["user_prompt"] == match.user)

    return holds


def _summary(
    name: str,
    answered: Sequence[tuple[MtQuestion, tuple[str, str]]],
    rows: Mapping[Place, Row],
    outcome: Outcome,
    max_new_tokens: int,
) -> Judged:
    """Count the judgments and collect the scores of all questions."""
    # Ratings of the whole judgments, by question and turn.
    judged = {}
    for place, row in rows.items():
        if not pending(row):
            judged[place] = parse_rating(row["judgment"])
    num_not_asked = sum(row["judgment"].startswith(NOT_ASKED) for row in rows.values())
    num_cut = sum(row["judgment"].startswith(CUT) for row in rows.values())
    # Two turns of each question; the rest failed or was not tried.
    num_unjudged = 2 * len(answered) - len(judged) - num_not_asked - num_cut
    complete = len(rows) == 2 * len(answered)
    has_reason = outcome.error is not None or num_unjudged == 0
    assert has_reason, "a judge that leaves turns out gives a reason"

    def score(number: int, turn: int) -> float | None:
        value = judged.get((number, turn), UNRATED)
        # Scores of some turns only would not be comparable.
        if value == UNRATED or not complete:
            return None
        return float(value)

    scores: list[TurnScores] = []
    for question, _ in answered:
        scores.append((score(question.question_id, 1), score(question.question_id, 2)))

    # The judge's error counts only for turns that no other process has judged meanwhile.
    error = None
    if num_unjudged > 0:
        error = outcome.error
    news = outcome.news
    if num_cut > 0:
        cut_news = (
            f"{num_cut} judgments were cut off by length (judge.max_new_tokens={max_new_tokens}) "
            "and count as unrated; raise it, and fedsim judge asks for them again"
        )
        news = (*news, cut_news)

    return Judged(
        name,
        scores,
        num_unrated=sum(value == UNRATED for value in judged.values()) + num_cut,
        num_not_asked=num_not_asked,
        num_unjudged=num_unjudged,
        complete=complete,
        error=error,
        gave_up=outcome.gave_up and num_unjudged > 0,
        news=news,
        num_cut=num_cut,
    )
