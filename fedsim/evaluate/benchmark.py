"""Contract of a benchmark, built in or from a user's file: reader, requests, scoring, figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.figures import Description, Figure, Source, figure_of, reply_figures
from fedsim.config import EvalConfig
from fedsim.data.chat import Conversation
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.evaluate.intervals import Mean, Rate
from fedsim.evaluate.measures import Found, Metrics, figure_metrics, reply_metrics
from fedsim.generate.engine import Dialogues, Engine, Replies, Reply

if TYPE_CHECKING:
    from fedsim.evaluate.mt_bench import MtAnswer

Values = Sequence[float | None]
"""One value an item, in their order; None for an item that does not count for the figure."""

Asked = tuple[Conversation, tuple[str, ...]]
"""A conversation and the replies to it that are scored."""


@dataclass(frozen=True)
class Result:
    """Outcome of a benchmark.

    Its replies may be harmful texts: they reach no terminal, log or artefact.

    Attributes:
        figures: by name, without ``eval/``, in the record's order: a rate or mean (recorded with
            interval and count), or a bare number.
        items: values by item of the figures that can be compared item by item.
        replies: free replies, in the order of the items (of several turns: one turn after the
            other).
        answers: answers that a judge may rate; only MT-Bench has any.
    """

    figures: Mapping[str, Found]
    items: Mapping[str, Values] = field(default_factory=dict, repr=False)
    replies: Sequence[Reply] = field(default=(), repr=False)
    answers: Sequence[MtAnswer] = field(default=(), repr=False)


class Benchmark(ABC):
    """A benchmark; a user's derives from it, as ``fedsim.Benchmark``.

    A class needs :attr:`name`, :attr:`title`, :attr:`figures`, :meth:`load`, :meth:`score`, and
    :meth:`ask` where the model is to write replies::

        class Brevity(Benchmark):
            name, title = "brevity", "Brevity"
            figures = (
                Figure("brevity_short", "Brevity: replies of at most 20 words", headline=True),
                Figure("brevity_words", "Brevity: words of a reply", "words", scale=None),
            )

            def load(self, path):
                return path.read_text(encoding="utf-8").splitlines()

            def ask(self, items, key):
                return [Dialogues([[user_turn(item)] for item in items], Sampling(0.0, 64), [key])]

            def score(self, engine, items, replies):
                words = [len(reply.text.split()) for reply in replies[0][0]]
                return {"brevity_short": [float(n <= 20) for n in words], "brevity_words": words}

    All else follows from the figures: ``eval/brevity_short`` in percent with ``_low``, ``_high``
    and ``_count`` in ``metrics.jsonl`` (Wilson's interval for a share whose values are 0 and 1,
    else Student's), lengths of the replies and signs of collapse (``eval/brevity_distinct_2`` and
    so on), ``items/``, plots, summary and report. The replies themselves are written only with
    ``record.texts``.

    The keyword arguments of the constructor are the benchmark's options.

    Attributes:
        name: in the configuration, in metric names and in the keys of draws; letters, digits and
            "_".
        title: for people.
        figures: what it measures; a name begins with the benchmark's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    figures: ClassVar[Sequence[Figure]]

    @abstractmethod
    def load(self, path: Path) -> Sequence[Any]:
        """Read the items of the file, in order.

        Raises:
            DataError: the file is missing or malformed; the message names file and line, and quotes
                no prompt.
        """

    def ask(self, items: Sequence[Any], key: Sequence[keyed_random.KeyPart]) -> Sequence[Dialogues]:
        """Conversations that the model is to answer.

        The replies of all benchmarks of an evaluation are generated together.

        Args:
            items: at least one; with ``eval.limit`` a fixed subset of the file's.
            key: names the draws; several dialogues of one benchmark append different parts to it.
        """
        return []

    def scored(self, items: Sequence[Any]) -> Sequence[Asked]:
        """Replies of the file that the engine scores in :meth:`score`; tokenised once a run."""
        return []

    @abstractmethod
    def score(
        self,
        engine: Engine,
        items: Sequence[Any],
        replies: Sequence[Replies],
    ) -> Mapping[str, Values]:
        """Compute values by item for each figure (or a variant: its name, "_" and a suffix).

        Args:
            engine: the model under test, which can score rows
                (:func:`fedsim.evaluate.scoring.reply_row`); every rank calls it alike.
            items: as :meth:`ask` had them.
            replies: ``replies[d][t][i]``: dialogue ``d`` of :meth:`ask`, turn ``t``, conversation
                ``i``.

        Returns:
            0 to 1 for a share, else in the figure's unit; None where an item does not count.
        """

    def measure(
        self,
        engine: Engine,
        items: Sequence[Any],
        replies: Sequence[Replies],
        guard: ExchangeJudge | None = None,
    ) -> Result:
        """Summarise :meth:`score` with intervals and counts, and count properties of the replies.

        Args:
            guard: classifies replies to attacks, where the run has one; only benchmarks that
                override this method can use it.

        Raises:
            ConfigError: a figure that the benchmark does not have, or values that do not fit the
                items.
        """
        # Values by item, summarised as a rate or a mean for each figure.
        values = self.score(engine, items, replies)
        figures: dict[str, Found] = {}
        for name, of_items in values.items():
            figure = self._checked(name, of_items, len(items))
            known = [float(value) for value in of_items if value is not None]
            if known:
                figures[name] = _summary(known, figure)

        # All replies: of each dialogue and turn, in the order of the items.
        said: list[Reply] = []
        for turns in replies:
            for turn in turns:
                said += turn
        if said:
            figures |= reply_metrics(self.name, said)
        return Result(figures, values, said)

    def _checked(self, name: str, values: Values, num_items: int) -> Figure:
        """Check the values of a figure and return its declaration; see :meth:`measure`."""
        # The figure must be declared; a variant has its name and a suffix.
        figure = figure_of(name, {figure.name: figure for figure in self.figures})
        what = f"benchmark {self.name}: score() gives {name!r}"
        if figure is None:
            known = ", ".join(figure.name for figure in self.figures)
            raise ConfigError(
                f"{what}, which is none of its figures ({known}); add a Figure of that name",
            )

        # One value for each item.
        if len(values) != num_items:
            fix = "give one for each item, None to leave an item out"
            raise ConfigError(f"{what} {len(values)} values for {num_items} items; {fix}")

        # Every value on the figure's scale; shares are from 0 to 1 here.
        low, high = figure.scale or (-math.inf, math.inf)
        if figure.is_share:
            low, high = 0.0, 1.0
        wrong = [value for value in values if value is not None and not low <= value <= high]
        if wrong:
            raise ConfigError(
                f"{what} the value {wrong[0]!r}; values must be from {low:g} to {high:g}",
            )
        return figure

    def metrics(self, result: Result) -> Metrics:
        """A result's figures under their metric names, with intervals and counts."""
        return figure_metrics(result.figures, {figure.name: figure for figure in self.figures})

    def describe(self) -> Description:
        """Description of the benchmark for tables and plots."""
        return Description(self.name, self.title, (*self.figures, *self.counted_figures()))

    def counted_figures(self) -> Sequence[Figure]:
        """Figures that count properties of the replies, such as their lengths."""
        return reply_figures(self.name, self.title)

    def depends(self) -> dict[str, Any]:
        """Further inputs of the figures, beside the file and the keys of ``eval``.

        They are part of a shared evaluation's name.
        """
        return {}


def _summary(values: Sequence[float], figure: Figure) -> Rate | Mean:
    """Rate of a share whose values are all 0 or 1, else the mean in the figure's unit."""
    # Wilson's interval for counts, Student's for any other values.
    if figure.is_share and all(value in (0.0, 1.0) for value in values):
        return Rate.of([value == 1.0 for value in values])
    return Mean.of([figure.factor * value for value in values])


@dataclass(frozen=True)
class EmbeddedFile:
    """A benchmark's file in the embedded world.

    Attributes:
        artefact: kind of the artefact that holds it.
        name: of the file.
        write: writes it to a path.
    """

    artefact: str
    name: str
    write: Callable[[Path], None]


class OwnBenchmark(Benchmark):
    """A built-in benchmark: its file is ``eval.<name>``, and the embedded world may have one.

    Attributes:
        figures: likewise, of the class.
        embedded: files of the embedded world by the value of ``eval.<name>``.
        sources: its published files, the items' first.
    """

    figures: ClassVar[Sequence[Figure]]
    embedded: ClassVar[Mapping[str, EmbeddedFile]]
    sources: ClassVar[Sequence[Source]] = ()

    @classmethod
    @abstractmethod
    def from_config(cls, settings: EvalConfig, *, judged: bool) -> Self:
        """Make the benchmark of a configuration.

        Args:
            judged: a language model rates answers.
        """

    @classmethod
    def chosen(cls, settings: EvalConfig) -> dict[str, str]:
        """Map the headline figure to the figure that it repeats, such as one phrase set's.

        The configuration chooses it. It is the latter figure that has the values by item.
        """
        return {}

    @classmethod
    def describe_class(cls) -> Description:
        """:meth:`describe` without an instance."""
        # Digest of the published file of the items.
        published = ""
        if cls.sources:
            published = cls.sources[0].sha256
        return Description(
            cls.name,
            cls.title,
            (*cls.figures, *reply_figures(cls.name, cls.title)),
            published,
        )

    def describe(self) -> Description:
        return self.describe_class()

    def score(
        self,
        engine: Engine,
        items: Sequence[Any],
        replies: Sequence[Replies],
    ) -> Mapping[str, Values]:
        raise NotImplementedError("built-in benchmarks override measure()")
