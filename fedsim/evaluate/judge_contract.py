"""Contract of a judge of MT-Bench answers, for a class of fedsim's own or of a user's file."""

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
from fedsim.evaluate.judge_prompts import JudgePrompt, Match
from fedsim.evaluate.mt_bench import SCALE

UNIT: Final = 8
"""Answers that a user's judge rates in one call; fixed, so that results depend on no number of
processes.
"""

UNRATED_TEXT: Final = "No rating."
"""Judgment of an answer that a user's judge does not rate."""

Report = Callable[[int, int], None]
"""Called with (done, total) turns or rows."""

Keep = Callable[[Match, str | None], None]
"""Writes one judgment to the file, on rank 0; None for a turn that the judge failed at."""


@dataclass(frozen=True)
class Work:
    """Answers of one model, and what a judge needs to rate them.

    Attributes:
        matches: all answers, in a fixed order.
        wanted: places in ``matches`` of the answers without a judgment, at least one; those never
            tried come first.
        ranks: the processes, all of which call the judge alike.
        device: of this rank.
        keep: called on rank 0 for each judgment.
        report: told the progress; None for nobody.
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
        error: why answers were left unjudged; None if none was.
        gave_up: the judge ended early, as it seems to fail for every turn.
        news: what a user should know about how the judge was asked.
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
        unit: what progress counts.
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
            One for each: a number from 1 to 10, a judgment as text with a rating such as ``[[7]]``
                in it, or None for
            an answer that gets no rating.

        Raises:
            JudgeError: a service that the judge asks fails. The run goes on without the remaining
                judgments, and ``fedsim judge`` asks for them again; any other error ends the run.
        """

    def judge_all(self, work: Work, what: str) -> Outcome:
        """Judge what has no judgment; every rank calls it and gets the same outcome.

        Args:
            what: ``key=value`` that names the judge in errors.

        Raises:
            ConfigError: :meth:`rate` returns something else than one rating for each answer.
            RunError: :meth:`rate` fails.
        """
        wanted = set(work.wanted)
        groups = [range(start, min(start + UNIT, len(work.matches))) for start in range(0, len(work.matches), UNIT)]
        groups = [group for group in groups if not wanted.isdisjoint(group)]

        def rate(group: range) -> list[str]:
            asked = [work.matches[place] for place in group]
            with calling(what, quiet=True):
                found = list(self.rate(asked))
            if len(found) != len(asked):
                raise ConfigError(
                    f"{what}: rate must return one rating for each of {len(asked)} answers",
                )
            return [_judgment(rating, what) for rating in found]

        num_done = 0
        # One group a rank, so that a stop loses little.
        for start in range(0, len(groups), work.ranks.size):
            wave = groups[start : start + work.ranks.size]
            try:
                judged = work.ranks.map(rate, wave)
            except JudgeError as error:
                return Outcome(error, gave_up=True)
            rated: dict[int, str] = {}
            for group, texts in zip(wave, judged, strict=True):
                rated |= {place: text for place, text in zip(group, texts, strict=True) if place in wanted}
            work.keep_all(rated)
            num_done += len(rated)
            if work.report is not None:
                work.report(work.num_held + num_done, len(work.matches))
        return Outcome()


class OwnJudge(Judge):
    """A judge of fedsim's own, which shares the work in its own way."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in FastChat's files."""

    def check(self, prompts: Mapping[str, JudgePrompt]) -> None:
        """Find out without a request and without loading a model whether it could judge.

        Raises:
            ConfigError, ModelError: it could not.
        """

    @abstractmethod
    def judge_all(self, work: Work, what: str) -> Outcome: ...

    def rate(self, matches: Sequence[Match]) -> Sequence[str | float | None]:
        raise NotImplementedError("fedsim's own override judge_all()")


class NoJudge(OwnJudge):
    """No judge: answers are written and not rated, but for the embedded questions, which have a
    rubric.
    """

    name = ""

    def judge_all(self, work: Work, what: str) -> Outcome:
        raise NotImplementedError("there is no judge")


def _judgment(rating: object, what: str) -> str:
    """The text that stands in FastChat's file for a rating."""
    if rating is None:
        return UNRATED_TEXT
    if isinstance(rating, str):
        return rating
    is_number = isinstance(rating, Real) and not isinstance(rating, bool)
    number = float(rating) if is_number else math.nan  # type: ignore[arg-type]
    if not SCALE[0] <= number <= SCALE[1]:
        raise ConfigError(
            f"{what}: rate returns {rating!r:.100}; each rating must be a number from "
            f"{SCALE[0]:g} to {SCALE[1]:g}, a text with a rating such as [[7]], or None",
        )
    return f"Rating: [[{int(number) if number.is_integer() else number}]]"
