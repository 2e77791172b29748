"""Evaluation of a model by all benchmarks of a run in one call.

Figures are under the metric names of the record. Rates are in percent and MT-Bench in points from 1
to 10, each with its 95 % interval (``_low``, ``_high``) and count; an interval of points is cut to
the scale, and the mean of one score has none. A benchmark without items, and a figure that cannot
be computed, are absent. No result depends on rank or wall-clock time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.figures import Benchmarks, name_given_twice
from fedsim.base.metric import Metric, writes
from fedsim.base.user_code import calling
from fedsim.evaluate.benchmark import Benchmark, OwnBenchmark, Result
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.mt_bench import MtAnswer
from fedsim.evaluate.scoring import subset_places
from fedsim.generate.engine import Dialogues, Engine, Reply

Items = dict[str, dict[int, float]]
"""Values by figure and by the item's place in the benchmark's file, counted from 0 and ascending.

Values are from 0 to 1 for a share, else in the figure's unit. Their mean is the figure (of a share
its percent / 100).
"""


@dataclass(frozen=True)
class Part:
    """A benchmark and its items.

    Attributes:
        benchmark: its requests and its scoring.
        items: at least one, in the order of the file.
    """

    benchmark: Benchmark
    items: Sequence[Any] = field(repr=False)

    def places(self, limit: int) -> list[int]:
        """Draw the places of the items that are used."""
        return subset_places(len(self.items), limit)

    def chosen(self, limit: int) -> list[Any]:
        """Select the items that are used."""
        return [self.items[place] for place in self.places(limit)]

    def calling(self) -> AbstractContextManager[None]:
        """Context in which the benchmark's code is called.

        An error in a user's file names file and line, and quotes no text.
        """
        if isinstance(self.benchmark, OwnBenchmark):
            return nullcontext()
        return calling(f"benchmark {self.benchmark.name}", quiet=True)


@dataclass(frozen=True)
class Suite:
    """All benchmarks of an evaluation and their settings.

    Attributes:
        parts: the benchmarks, in the order of their figures.
        guard: a guard model that also classifies replies to attacks.
        limit: items used of each benchmark, drawn by a fixed key; 0 takes all.

    Raises:
        ConfigError: two benchmarks or figures have one name.
    """

    parts: Sequence[Part] = ()
    guard: ExchangeJudge | None = None
    limit: int = 0

    def __post_init__(self) -> None:
        twice = name_given_twice(part.benchmark.describe() for part in self.parts)
        if twice is not None:
            raise ConfigError(f"eval: the {twice} is there twice; give one of the two another name")

    @property
    def described(self) -> Benchmarks:
        """Descriptions of the benchmarks for tables and plots."""
        return Benchmarks(tuple(part.benchmark.describe() for part in self.parts))

    def counts(self) -> dict[str, int]:
        """Count the items used of each benchmark, by its title."""
        return {part.benchmark.title: len(part.places(self.limit)) for part in self.parts}

    def part(self, name: str) -> Part | None:
        """Find the benchmark of this name; None where it is left out."""
        for part in self.parts:
            if part.benchmark.name == name:
                return part
        return None


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a suite.

    Attributes:
        metrics: figures by metric name, for the record.
        items: values by item, of which the figures are means; without a judge's scores.
        answers: answers to MT-Bench, for a judge and for
            :func:`fedsim.evaluate.fastchat.write_answers`.
        results: by benchmark, with all replies, which must not be shown; none where it was read
            from an artefact.
        artefact: name of the artefact that holds it; None where no other run can read it.
        reused: it was read from the artefact, and not computed by this run.
    """

    metrics: Metrics
    items: Items = field(default_factory=dict, repr=False)
    answers: Sequence[MtAnswer] = field(default=(), repr=False)
    results: Mapping[str, Result] = field(default_factory=dict)
    artefact: str | None = None
    reused: bool = False


def evaluate(engine: Engine, suite: Suite, key: Sequence[keyed_random.KeyPart]) -> Evaluation:
    """Run every benchmark of the suite on the model in its present state.

    All replies are generated in one call of the engine, so that there is only one tail of long
    replies, in which slots are empty.

    Args:
        engine: the model under test, shared over the ranks; every rank gets the same result.
        suite: benchmarks and settings.
        key: names the draws, such as ``("eval", round_idx)``; a benchmark's draws also have its
            name in their key. One key for all evaluation points of a run makes them comparable: the
            changed model gets the same uniform numbers.
    """
    # Step 1: collect the requests of all benchmarks.
    asked: list[list[Dialogues]] = []  # by benchmark
    for part in suite.parts:
        with part.calling():
            requests = part.benchmark.ask(part.chosen(suite.limit), (*key, part.benchmark.name))
            asked.append(list(requests))

    # Step 2: generate all replies.
    replies = iter(engine.hold(list(chain.from_iterable(asked))))

    # Step 3: measure each benchmark on its own replies.
    metrics: Metrics = {}
    items: Items = {}
    answers: list[MtAnswer] = []
    results: dict[str, Result] = {}
    free_replies: list[Reply] = []
    for part, of_part in zip(suite.parts, asked, strict=True):
        said = list(islice(replies, len(of_part)))
        with part.calling():
            result = part.benchmark.measure(engine, part.chosen(suite.limit), said, suite.guard)
        results[part.benchmark.name] = result
        metrics |= part.benchmark.metrics(result)
        answers += result.answers
        items |= _by_place(result, part.places(suite.limit))
        free_replies += result.replies
    metrics |= length_metrics(free_replies)
    return Evaluation(metrics, items, answers, results)


def _by_place(result: Result, places: Sequence[int]) -> Items:
    """Values of each figure by the place of their item; items that do not count are left out."""
    found: Items = {}
    for name, values in result.items.items():
        of_figure = {}
        for place, value in zip(places, values, strict=True):
            if value is not None:
                of_figure[place] = float(value)
        found[name] = of_figure
    return found


@writes(
    Metric(
        "eval/truncated",
        "replies of all benchmarks cut at the limit",
        "replies",
        "a benchmark has free replies",
    ),
    Metric(
        "eval/num_replies",
        "replies of all benchmarks",
        "replies",
        "a benchmark has free replies",
    ),
    Metric("eval/thoughts", "replies whose thoughts were left out", "replies", "the model thinks"),
    Metric(
        "eval/thoughts_unfinished",
        "of these, replies whose thought never ended",
        "replies",
        "the model thinks",
    ),
)
def length_metrics(replies: Sequence[Reply]) -> Metrics:
    """Count all free replies and the truncated ones.

    Where a model thinks, also the replies whose thoughts were left out (``eval/thoughts``), and
    those of them whose thought never ended, so that there is no answer
    (``eval/thoughts_unfinished``).
    """
    metrics: Metrics = {}
    if replies:
        metrics["eval/truncated"] = sum(reply.truncated for reply in replies)
        metrics["eval/num_replies"] = len(replies)
    thoughts = [reply.thought for reply in replies if reply.thought != "none"]
    if thoughts:
        metrics |= {
            "eval/thoughts": len(thoughts),
            "eval/thoughts_unfinished": thoughts.count("open"),
        }
    return metrics
