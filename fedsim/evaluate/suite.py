"""All benchmarks of a run in one call, and their figures under the metric names of the record.
 Rates are in percent and MT-Bench in points from 1 to 10, each with its 95 % interval (``_low``,
``_high``) and count; an interval of points ends where the scale does, and the mean of one score has
none. A benchmark without items, and a figure that cannot be had, is absent. Nothing depends on rank
or wall-clock time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
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
 0 to 1 for a share, else in the figure's unit. Their mean is the figure (of a share its percent /
100).
"""


@dataclass(frozen=True)
class Part:
    """A benchmark and its items.

    Attributes:
        benchmark: what is asked, and what is made of the answers.
        items: at least one, in the order of the file.
    """

    benchmark: Benchmark
    items: Sequence[Any] = field(repr=False)

    def places(self, limit: int) -> list[int]:
        """Places of the items that are used."""
        return subset_places(len(self.items), limit)

    def chosen(self, limit: int) -> list[Any]:
        """The items that are used."""
        return [self.items[place] for place in self.places(limit)]

    def calling(self) -> AbstractContextManager[None]:
        """The block calls the benchmark's code: an error in a user's file names file and line, and
        quotes no text.
        """
        if isinstance(self.benchmark, OwnBenchmark):
            return nullcontext()
        return calling(f"benchmark {self.benchmark.name}", quiet=True)


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
        parts: the benchmarks, in the order of their figures.
        guard: a guard model that also judges replies to attacks.
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
        """What tables and plots need to know of the benchmarks."""
        return Benchmarks(tuple(part.benchmark.describe() for part in self.parts))

    def counts(self) -> dict[str, int]:
        """Items used of each benchmark, by its title."""
        return {part.benchmark.title: len(part.places(self.limit)) for part in self.parts}

    def part(self, name: str) -> Part | None:
        """The benchmark of this name; None where it is left out."""
        return next((part for part in self.parts if part.benchmark.name == name), None)


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a suite.

    Attributes:
        metrics: figures by metric name, for the record.
        items: what the figures are means of; a judge's scores are not among them.
        answers: answers to MT-Bench, for a judge and for
            :func:`fedsim.evaluate.fastchat.write_answers`.
        results: by benchmark, with all replies, which must not be shown; none where it was read
            from an artefact.
        artefact: name of the artefact that holds it; None where no other run can read it.
        reused: it was read from there, and not computed by this run.
    """

    metrics: Metrics
    items: Items = field(default_factory=dict, repr=False)
    answers: Sequence[MtAnswer] = field(default=(), repr=False)
    results: Mapping[str, Result] = field(default_factory=dict)
    artefact: str | None = None
    reused: bool = False


def evaluate(engine: Engine, suite: Suite, key: Sequence[keyed_random.KeyPart]) -> Evaluation:
    """Run every benchmark of the suite on the model as it stands.

    All replies are generated in one call of the engine, so that one tail of long replies is waited
    for and not several.

    Args:
        engine: the model under test, shared over the ranks; every rank gets the same result.
        suite: benchmarks and settings.
        key: names the draws, such as ``("eval", round_idx)``; a benchmark's are named by it and the
            benchmark's name. One key for all points of a run makes them comparable: the same
            uniform numbers meet the changed model.
    """
    asked: list[list[Dialogues]] = []
    for part in suite.parts:
        with part.calling():
            asked.append(
                list(part.benchmark.ask(part.chosen(suite.limit), (*key, part.benchmark.name))),
            )
    replies = iter(engine.hold([dialogues for of_part in asked for dialogues in of_part]))

    metrics: Metrics = {}
    items: Items = {}
    answers: list[MtAnswer] = []
    results: dict[str, Result] = {}
    for part, of_part in zip(suite.parts, asked, strict=True):
        said = list(islice(replies, len(of_part)))
        with part.calling():
            result = part.benchmark.measure(engine, part.chosen(suite.limit), said, suite.guard)
        results[part.benchmark.name] = result
        metrics |= part.benchmark.metrics(result)
        answers += result.answers
        items |= dict(_placed(result, part.places(suite.limit)))
    metrics |= length_metrics([reply for result in results.values() for reply in result.replies])
    return Evaluation(metrics, items, answers, results)


def _placed(result: Result, places: Sequence[int]) -> Iterator[tuple[str, dict[int, float]]]:
    """Values of each figure by the place of their item; items that do not count are left out."""
    for name, values in result.items.items():
        yield (
            name,
            {place: float(v) for place, v in zip(places, values, strict=True) if v is not None},
        )


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
    """Truncated among all free replies.

    Where a model thinks: replies whose thoughts were left out (``eval/thoughts``), and those of
    them whose thought never ended, so that there is no answer (``eval/thoughts_unfinished``).
    """
    flags = [reply.truncated for reply in replies]
    thoughts = [reply.thought for reply in replies if reply.thought != "none"]
    metrics: Metrics = {"eval/truncated": sum(flags), "eval/num_replies": len(flags)} if flags else {}
    if thoughts:
        metrics |= {
            "eval/thoughts": len(thoughts),
            "eval/thoughts_unfinished": thoughts.count("open"),
        }
    return metrics
