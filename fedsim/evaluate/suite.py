"""All benchmarks of a run in one call, and their figures under the metric names of the record.

Rates are in percent and MT-Bench in points from 1 to 10, each with its 95 % interval (``_low``, ``_high``) and count;
an interval of points ends where the scale does, and the mean of one score has none.
A benchmark without items, and a figure that cannot be had, is absent. Nothing depends on rank or wall-clock time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim import keys
from fedsim.data.benchmarks import AdvBenchItem, HhhItem, MtQuestion
from fedsim.data.chat import Conversation
from fedsim.data.xstest import XsTestItem
from fedsim.errors import ConfigError
from fedsim.evaluate.advbench import AdvBenchResult, Judge, ask_advbench
from fedsim.evaluate.asking import Asking, answer_all
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.evaluate.hhh import SCORERS, HhhResult, ask_hhh
from fedsim.evaluate.judge import Judged
from fedsim.evaluate.measures import Items, Metrics, collapse_metrics, rate_metrics
from fedsim.evaluate.mt_bench import MtAnswer, MtResult, Rubric, ask_mt_bench, mean_scores
from fedsim.evaluate.perplexity import Perplexity, run_perplexity
from fedsim.evaluate.phrases import PHRASE_SETS, WORLD, PhraseRule
from fedsim.evaluate.xstest import Refuses, XsTestResult, ask_xstest
from fedsim.generate.engine import Engine, Reply, Sampling


@dataclass(frozen=True)
class Suite:
    """What is measured, and how.

    Attributes:
        advbench: attacks; none leaves the benchmark out.
        hhh: comparisons; none leaves the benchmark out.
        mt_bench: two-turn questions; none leaves the benchmark out.
        xstest: prompts that sound harmful or are; none leaves the benchmark out.
        helpful: held-out conversations whose perplexity is measured; none leaves it out.
        judge: grammar of the embedded world, where the attacks are its own.
        refuses: the same grammar's word on refusals, where ``xstest`` is its own.
        guard: a guard model that also judges the replies to attacks and to XSTest's unsafe prompts.
        rubric: scores answers to ``mt_bench``; without it they are answered and not scored.
        advbench_phrases: rule of ``eval/advbench_harmless``; a phrase set, "strict_world" where there is a judge, or
            one of ``rules``.
        rules: phrase rules of a user's file, by name.
        hhh_scorer: scorer of ``eval/hhh_accuracy``; all of :data:`fedsim.evaluate.hhh.SCORERS` run.
        temperature: of AdvBench; 0 is greedy.
        max_new_tokens: of AdvBench, of XSTest (which takes fewer) and of each MT-Bench turn.
        limit: items used of each benchmark, drawn by a fixed key; 0 takes all.
    """

    advbench: Sequence[AdvBenchItem] = field(default=(), repr=False)
    hhh: Sequence[HhhItem] = field(default=(), repr=False)
    mt_bench: Sequence[MtQuestion] = field(default=(), repr=False)
    xstest: Sequence[XsTestItem] = field(default=(), repr=False)
    helpful: Sequence[Conversation] = field(default=(), repr=False)
    judge: Judge | None = None
    refuses: Refuses | None = None
    guard: ExchangeJudge | None = None
    rubric: Rubric | None = None
    advbench_phrases: str = "openfedllm"
    rules: Mapping[str, PhraseRule] = field(default_factory=dict)
    hhh_scorer: str = "letter"
    temperature: float = 0.7
    max_new_tokens: int = 1024
    limit: int = 0

    def counts(self) -> dict[str, int]:
        """Items of each benchmark that is run, by its title."""
        sizes = {
            "AdvBench": len(self.advbench),
            "HHH": len(self.hhh),
            "MT-Bench": len(self.mt_bench),
            "XSTest": len(self.xstest),
            "helpful conversations": len(self.helpful),
        }
        return {name: min(size, self.limit or size) for name, size in sizes.items() if size}

    def __post_init__(self) -> None:
        rules = (*PHRASE_SETS, *(() if self.judge is None else (WORLD,)), *self.rules)
        if self.advbench_phrases not in rules:
            raise ConfigError(f"eval.advbench_phrases={self.advbench_phrases!r}: must be one of {', '.join(rules)}")
        if self.hhh_scorer not in SCORERS:
            raise ConfigError(f"eval.hhh_scorer={self.hhh_scorer!r}: must be one of {', '.join(SCORERS)}")


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a suite; a benchmark that was left out is None.

    Attributes:
        metrics: figures by metric name, for the record.
        advbench: with all replies, which must not be shown.
        hhh: by scorer.
        mt_bench: with all answers.
        xstest: with all replies, which must not be shown.
        perplexity: of the held-out conversations.
        items: what the figures are means of, one value an item; a judge's scores are not among them.
        artefact: name of the artefact that holds it; None where no other run can read it.
        reused: it was read from there, and not computed by this run.
    """

    metrics: Metrics
    advbench: AdvBenchResult | None
    hhh: HhhResult | None
    mt_bench: MtResult | None
    xstest: XsTestResult | None = None
    perplexity: Perplexity | None = None
    items: Items = field(default_factory=dict, repr=False)
    artefact: str | None = None
    reused: bool = False

    @property
    def answers(self) -> list[MtAnswer]:
        """MT-Bench answers for :func:`fedsim.evaluate.fastchat.write_answers`; empty where it was left out."""
        return [] if self.mt_bench is None else self.mt_bench.answers


def evaluate(engine: Engine, suite: Suite, key: Sequence[keys.KeyPart]) -> Evaluation:
    """Run every benchmark of the suite on the model as it stands.

    Args:
        engine: the model under test, shared over the ranks; every rank gets the same result.
        suite: benchmarks and settings.
        key: names the draws, such as ``("eval", round_idx)``. One key for all points of a run makes them comparable:
            the same uniform numbers meet the changed model.
    """
    asked: dict[str, Asking[Any]] = {}
    if suite.advbench:
        asked["advbench"] = ask_advbench(
            suite.advbench,
            Sampling(suite.temperature, suite.max_new_tokens),
            (*key, "advbench"),
            limit=suite.limit,
            judge=suite.judge,
            guard=suite.guard,
            rules=suite.rules,
        )
    if suite.hhh:
        asked["hhh"] = ask_hhh(engine, suite.hhh, SCORERS, (*key, "hhh"), limit=suite.limit)
    if suite.mt_bench:
        asked["mt_bench"] = ask_mt_bench(
            suite.mt_bench, suite.max_new_tokens, (*key, "mt_bench"), limit=suite.limit, rubric=suite.rubric
        )
    if suite.xstest:
        asked["xstest"] = ask_xstest(
            suite.xstest,
            suite.max_new_tokens,
            (*key, "xstest"),
            limit=suite.limit,
            refuses=suite.refuses,
            guard=suite.guard,
        )
    found = answer_all(engine, asked)
    advbench, hhh, mt_bench, xstest = (found.get(name) for name in ("advbench", "hhh", "mt_bench", "xstest"))
    perplexity = run_perplexity(engine, suite.helpful, limit=suite.limit) if suite.helpful else None
    metrics: Metrics = {}
    if advbench is not None:
        metrics |= _advbench_metrics(advbench, suite.advbench_phrases)
    if hhh is not None:
        metrics |= _hhh_metrics(hhh, suite.hhh_scorer)
    if mt_bench is not None:
        metrics |= mt_bench.metrics()
    if xstest is not None:
        metrics |= xstest.metrics()
    if perplexity is not None:
        metrics |= perplexity.metrics()
    return Evaluation(
        metrics | _length_metrics(advbench, mt_bench, xstest),
        advbench,
        hhh,
        mt_bench,
        xstest,
        perplexity,
        {k: v for found in (advbench, hhh, mt_bench, xstest) if found is not None for k, v in found.items().items()},
    )


def _advbench_metrics(result: AdvBenchResult, headline: str) -> Metrics:
    rates = result.harmless
    metrics = rate_metrics("eval/advbench_harmless", rates[headline])
    metrics["eval/advbench_count"] = result.count
    for name, rate in rates.items():
        metrics |= rate_metrics(f"eval/advbench_harmless_{name.replace('-', '_')}", rate)
    if result.grammatical is not None:
        metrics |= rate_metrics("eval/advbench_grammatical", result.grammatical)
    if result.guard is not None:
        metrics |= result.guard.metrics("eval/advbench")
    metrics["eval/advbench_truncated"] = result.num_truncated
    metrics["eval/advbench_prompts_truncated"] = result.num_prompts_truncated
    metrics["eval/advbench_empty"] = result.num_empty
    metrics["eval/advbench_mean_tokens"] = result.mean_tokens
    return metrics | collapse_metrics("eval/advbench", result.collapse)


def _hhh_metrics(result: HhhResult, headline: str) -> Metrics:
    metrics = rate_metrics("eval/hhh_accuracy", result.scores[headline].accuracy)
    metrics["eval/hhh_count"] = result.count
    metrics["eval/hhh_always_a"] = result.always_a.percent
    for name, score in result.scores.items():
        metrics |= rate_metrics(f"eval/hhh_{name}", score.accuracy)
        metrics[f"eval/hhh_{name}_undecided"] = score.num_undecided
        metrics[f"eval/hhh_{name}_truncated"] = score.num_truncated
        if score.picks_a is not None:
            metrics[f"eval/hhh_{name}_picks_a"] = score.picks_a.percent
            metrics[f"eval/hhh_{name}_picks_a_count"] = score.picks_a.total
        if score.one_order is not None:
            metrics[f"eval/hhh_{name}_one_order"] = score.one_order.percent
    return metrics


def judge_metrics(judged: Judged, questions: Sequence[MtQuestion]) -> Metrics:
    """The figures that a judge adds to an evaluation: means of its scores, and the turns that are not in them."""
    counts: Metrics = {
        "eval/mt_bench_unrated": judged.num_unrated,
        "eval/mt_bench_judgments_cut": judged.num_cut,
        "eval/mt_bench_not_asked": judged.num_not_asked,
        "eval/mt_bench_judge_failed": judged.num_unjudged,
    }
    return mean_scores(questions, judged.scores).metrics() | counts


def _length_metrics(advbench: AdvBenchResult | None, mt_bench: MtResult | None, xstest: XsTestResult | None) -> Metrics:
    """Truncated among all free replies; HHH's answers of 16 tokens are cut by design and not counted.

    Where a model thinks: replies whose thoughts were left out (``eval/thoughts``), and those of them
    whose thought never ended, so that there is no answer (``eval/thoughts_unfinished``).
    """
    replies: Sequence[Reply] = [
        *(advbench.replies if advbench is not None else ()),
        *(mt_bench.replies if mt_bench is not None else ()),
        *(xstest.replies if xstest is not None else ()),
    ]
    flags = [reply.truncated for reply in replies]
    thoughts = [reply.thought for reply in replies if reply.thought != "none"]
    metrics: Metrics = {"eval/truncated": sum(flags), "eval/num_replies": len(flags)} if flags else {}
    if thoughts:
        metrics |= {"eval/thoughts": len(thoughts), "eval/thoughts_unfinished": thoughts.count("open")}
    return metrics
