"""The judge of MT-Bench: rates every answer that has no judgment yet, and keeps each judgment at once.

A judgment that the file already holds is taken over where judge, model, question, turn and the whole text that the
judge was shown (answers and reference are in it) are the same. The system message and ``judge.max_new_tokens`` are not
in FastChat's rows: remove the file to have everything judged anew after changing one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsim.config import Config
from fedsim.data.benchmarks import MtQuestion
from fedsim.errors import JudgeError
from fedsim.evaluate.fastchat import UNRATED, JudgmentFile, Row, judgment_row
from fedsim.evaluate.judge_client import OpenAiClient, Pause
from fedsim.evaluate.judge_inputs import judge_files, judge_name, load_questions, load_references
from fedsim.evaluate.judge_local import judge_locally
from fedsim.evaluate.judge_pool import Keep, RequestPool
from fedsim.evaluate.judge_prompts import JudgePrompt, Match, load_judge_prompts, make_matches, parse_rating
from fedsim.evaluate.mt_bench import TurnScores
from fedsim.ranks import Ranks

POLL_S = 5.0  # ranks that wait for rank 0's requests meet this often, so that no collective times out

Report = Callable[[int, int], None]
"""Told (done, total) turns or units."""


@dataclass(frozen=True)
class Judged:
    """What a judge made of one model's answers.

    Attributes:
        judge: its name.
        scores: of every question, in order; all without a score if any turn was left unjudged.
        num_unrated: judgments without a rating.
        num_unjudged: turns without a judgment.
        error: why some were left unjudged; None if none was.
    """

    judge: str
    scores: list[TurnScores]
    num_unrated: int
    num_unjudged: int
    error: JudgeError | None


class MtJudge:
    """The judge that a configuration asks for.

    Args:
        config: its ``judge`` part, the question file and the references.
        ranks: rank 0 asks an endpoint; all ranks share a local model's work.
        device: of this rank.
        pause: see :class:`fedsim.evaluate.judge_pool.RequestPool`.

    Raises:
        DataError: see :func:`fedsim.evaluate.judge_inputs.check_judge`.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, pause: Pause | None = None) -> None:
        assert config.judge.kind != "none", "there is no judge"
        self.config = config
        self.ranks = ranks
        self.device = device
        self.pause = pause
        self.questions = load_questions(config)
        self.prompts: dict[str, JudgePrompt] = load_judge_prompts(judge_files(config)["judge_prompts"])
        self.references = load_references(config, self.questions)

    @property
    def unit(self) -> str:
        """What progress counts: requests, or a local model's batches on this rank."""
        return "turns" if self.config.judge.kind == "openai" else "batches"

    def judge(
        self,
        folder: Path,
        model_id: str,
        answered: Sequence[tuple[MtQuestion, tuple[str, str]]],
        report: Report | None = None,
    ) -> Judged:
        """Judge both turns of ``answered``, all of one model; the result is the same on every rank.

        Args:
            folder: FastChat's ``data/mt_bench``: judgments are in ``model_judgment`` there.
            model_id: FastChat's name of the model.
            answered: questions with the answers to both turns.
            report: told the progress, in :attr:`unit`.
        """
        name = judge_name(self.config)
        file = JudgmentFile(folder, name)
        matches = make_matches(self.prompts, answered, self.references)
        held = self.ranks.once(lambda: _take_over(file, model_id, matches))
        missing = [match for match in matches if (match.question_id, match.turn) not in held]

        def keep(match: Match, judgment: str) -> None:
            row = judgment_row(
                match.question_id,
                model_id,
                (name, match.prompt_name),
                match.user,
                judgment,
                parse_rating(judgment),
                match.turn,
                time.time(),
            )
            file.append(row)
            held[match.question_id, match.turn] = row

        def settle() -> dict[tuple[int, int], float]:
            file.replace(model_id, held.values())
            return {place: row["score"] for place, row in held.items()}

        error = None
        if missing and self.config.judge.kind == "openai":
            error = self._ask(missing, keep, report, len(held))
        elif missing:
            self._judge_locally(matches, keep, report)
        return _summary(name, answered, self.ranks.once(settle), error)

    def _judge_locally(self, matches: Sequence[Match], keep: Keep, report: Report | None) -> None:
        """All of the model's answers, even if some are judged: which rows share a batch may show in the last bits."""
        judgments = judge_locally(self.config, self.ranks, self.device, matches, report)

        def keep_all() -> None:
            for match, judgment in zip(matches, judgments, strict=True):
                keep(match, judgment)

        self.ranks.once(keep_all)

    def _ask(self, missing: Sequence[Match], keep: Keep, report: Report | None, num_held: int) -> JudgeError | None:
        """Rank 0 sends the requests; all ranks meet every few seconds. Returns what ended it early."""
        pools: list[RequestPool] = []

        def poll() -> tuple[int, bool, JudgeError | None]:
            if not pools:
                client, settings = OpenAiClient(self.config.judge), self.config.judge
                pools.append(RequestPool(missing, client.ask, keep, settings.workers, self.pause))
            done, over = pools[0].wait(POLL_S)
            return done, over, pools[0].failure if over else None

        while True:
            done, over, error = self.ranks.once(poll)
            if report is not None:
                report(num_held + done, num_held + len(missing))
            if over:
                return error


def _take_over(file: JudgmentFile, model_id: str, matches: Sequence[Match]) -> dict[tuple[int, int], Row]:
    """The model's judgments that still hold, by (question, turn); its others leave the file."""
    asked = {(m.question_id, m.turn): m for m in matches}
    held: dict[tuple[int, int], Row] = {}
    rows = [row for row in file.rows() if row["model"] == model_id and row["judge"][0] == file.judge]
    for row in rows:
        match = asked.get((row["question_id"], row["turn"]))
        if match is None or [row["judge"], row["user_prompt"]] != [[file.judge, match.prompt_name], match.user]:
            continue
        if row["judgment"] != "$ERROR$":  # what FastChat writes where its requests failed
            held[row["question_id"], row["turn"]] = {**row, "score": parse_rating(row["judgment"])}
    if len(held) != len(rows):
        file.replace(model_id, held.values())
    return held


def _summary(
    name: str,
    answered: Sequence[tuple[MtQuestion, tuple[str, str]]],
    scores: Mapping[tuple[int, int], float],
    error: JudgeError | None,
) -> Judged:
    num_unjudged = 2 * len(answered) - len(scores)
    assert (error is None) == (num_unjudged == 0), "what is left unjudged has a reason"

    def score(number: int, turn: int) -> float | None:
        value = scores[number, turn]
        return None if value == UNRATED else float(value)

    numbers = [question.question_id for question, _ in answered]
    pairs: list[TurnScores] = [(None, None)] * len(answered)
    if num_unjudged == 0:
        pairs = [(score(number, 1), score(number, 2)) for number in numbers]
    num_unrated = sum(value == UNRATED for value in scores.values())
    return Judged(name, pairs, num_unrated, num_unjudged, error)
