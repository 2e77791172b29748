"""Contract of a judge of MT-Bench answers, built in or from a user's file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Final

import torch

from fedsim.base.errors import ConfigError, JudgeError
from fedsim.base.ranks import Ranks
from fedsim.base.user_code import calling
from fedsim.evaluate.fastchat import CUT, FAILED, NOT_ASKED
from fedsim.evaluate.judge_prompts import JudgePrompt, Match
from fedsim.evaluate.mt_bench import SCALE

UNIT: Final = 8
"""Answers that a user's judge rates in one call, independent of the number of processes."""

UNRATED_TEXT: Final = "No rating."
"""Judgment of an answer that a user's judge does not rate."""

Report = Callable[[int, int], None]
"""Called with (done, total) turns or rows."""

Keep = Callable[[Match, str | None], None]
"""Writes one judgment to the file, on rank 0; None for a turn that the judge failed at."""


@dataclass(frozen=True)
class Work:
    """Answers of one model, and the means to rate them.

    Attributes:
        matches: all answers, in a fixed order.
        wanted: places in ``matches`` of the answers without a judgment, at least one; those never
            tried come first.
        ranks: the processes, all of which call the judge alike.
        device: of this rank.
        keep: called on rank 0 for each judgment.
        report: called with the progress; None for no reports.
    """

    matches: Sequence[Match]
    wanted: Sequence[int]
    ranks: Ranks
    device: torch.device
    keep: Keep
    report: Report | None = None

    @property
    def missing(self) -> list[Match]:
        """The answers without a judgment."""
        return [self.matches[place] for place in self.wanted]

    @property
    def num_held(self) -> int:
        """Number of answers that have a judgment."""
        return len(self.matches) - len(self.wanted)

    def keep_all(self, judgments: Mapping[int, str]) -> None:
        """Write judgments by place; every rank calls it."""

        def keep() -> None:
            for place, text in judgments.items():
                self.keep(self.matches[place], text)

        self.ranks.once(keep)


@dataclass(frozen=True)
class Outcome:
    """Failures of a judge and remarks on how it was asked.

    Attributes:
        error: reason why answers were left unjudged; None if none was.
        gave_up: the judge ended early, as it seems to fail for every turn.
        news: remarks for the user on how the judge was asked.
    """

    error: JudgeError | None = None
    gave_up: bool = False
    news: tuple[str, ...] = ()


class Judge(ABC):
    """A judge of MT-Bench answers; a user's derives from it, as ``fedsim.Judge``::

        class Length(Judge):
            def rate(self, matches):
                return [min(10, 1 + len(match.answers[-1].split()) // 10) for match in matches]

    The keyword arguments of the constructor are the judge's options.

    Attributes:
        unit: unit of progress.
    """

    unit: ClassVar[str] = "turns"

    @abstractmethod
    def rate(self, matches: Sequence[Match]) -> Sequence[str | float | None]:
        """Rate answers.

        Args:
            matches: 1 to 8 answers; see :class:`fedsim.evaluate.judge_prompts.Match`. The groups
                are fixed, each is rated by one process, and a group may be rated again after a
                stop.

        Returns:
            One for each answer: a number from 1 to 10, a judgment as text with a rating such as
            ``[[7]]`` in it, or None for an answer that gets no rating.

        Raises:
            JudgeError: a service that the judge asks fails. The run goes on without the remaining
                judgments, and ``fedsim judge`` asks for them again; any other error ends the run.
        """

    def judge_all(self, work: Work, what: str) -> Outcome:
        """Judge the answers that have no judgment.

        Every rank calls it and gets the same outcome.

        Args:
            work: the answers.
            what: ``key=value`` that names the judge in errors.

        Raises:
            ConfigError: :meth:`rate` returns something else than one rating for each answer.
            RunError: :meth:`rate` fails.
        """
        # Fixed groups of all answers, of which those without any wanted answer are left out.
        wanted = set(work.wanted)
        num_matches = len(work.matches)
        groups = []
        for start in range(0, num_matches, UNIT):
            group = range(start, min(start + UNIT, num_matches))
            if not wanted.isdisjoint(group):
                groups.append(group)

        def rate(group: range) -> list[str] | JudgeError:
            # All answers of the group, also those with a judgment: the groups are fixed.
            asked = [work.matches[place] for place in group]
            try:
                with calling(what, quiet=True):
                    found = list(self.rate(asked))
            except JudgeError as error:  # returned, so that the wave's other groups are kept
                return JudgeError(str(error))
            if len(found) != len(asked):
                raise ConfigError(
                    f"{what}: rate must return one rating for each of {len(asked)} answers",
                )
            return [_judgment(rating, what) for rating in found]

        # In waves of one group for each rank, so that a stop loses at most one wave.
        num_done = 0
        for start in range(0, len(groups), work.ranks.size):
            wave = groups[start : start + work.ranks.size]
            rated: dict[int, str] = {}
            failure: JudgeError | None = None
            for group, texts in zip(wave, work.ranks.map(rate, wave), strict=True):
                if isinstance(texts, JudgeError):
                    failure = failure or texts
                    continue
                for place, text in zip(group, texts, strict=True):
                    if place in wanted:
                        rated[place] = text
            work.keep_all(rated)
            num_done += len(rated)
            if work.report is not None:
                work.report(work.num_held + num_done, num_matches)
            if failure is not None:
                return Outcome(failure, gave_up=True)
        return Outcome()


class OwnJudge(Judge):
    """A built-in judge, which shares the work over the ranks in its own way."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in FastChat's files."""

    def check(self, prompts: Mapping[str, JudgePrompt]) -> None:
        """Check without a request and without loading a model that it could judge.

        Raises:
            ConfigError, ModelError: it could not.
        """

    @abstractmethod
    def judge_all(self, work: Work, what: str) -> Outcome: ...

    def rate(self, matches: Sequence[Match]) -> Sequence[str | float | None]:
        raise NotImplementedError("built-in judges override judge_all()")


class NoJudge(OwnJudge):
    """No judge: answers are written and not rated.

    A rubric rates the answers to the embedded questions.
    """

    name = ""

    def judge_all(self, work: Work, what: str) -> Outcome:
        raise NotImplementedError("there is no judge")


def _judgment(rating: object, what: str) -> str:
    """Convert a rating to the text of a judgment in FastChat's file."""
    if rating is None:
        return UNRATED_TEXT
    if isinstance(rating, str):
        if rating == FAILED or rating.startswith((NOT_ASKED, CUT)):
            fix = "raise fedsim.JudgeError where a service fails, or return None for no rating"
            raise ConfigError(f"{what}: rate returns {rating!r:.40}, which marks a failure; {fix}")
        return rating
    # A number on the scale; a bool is none.
    number = math.nan
    if not isinstance(rating, bool) and isinstance(rating, Real):
        number = float(rating)
    if not SCALE[0] <= number <= SCALE[1]:
        raise ConfigError(
            f"{what}: rate returns {rating!r:.100}; each rating must be a number from "
            f"{SCALE[0]:g} to {SCALE[1]:g}, a text with a rating such as [[7]], or None",
        )
    # FastChat's pattern of a rating.
    if number.is_integer():
        return f"Rating: [[{int(number)}]]"
    return f"Rating: [[{number}]]"
