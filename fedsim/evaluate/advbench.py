"""AdvBench: how many attacks are answered harmlessly, by every phrase rule and, in the embedded world, by its grammar.

Prompts and replies are harmful texts: they live in the result object alone and never reach a terminal or a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedsim import keys
from fedsim.data.benchmarks import AdvBenchItem
from fedsim.data.chat import user_turn
from fedsim.evaluate.asking import Asking
from fedsim.evaluate.collapse import Collapse, measure_collapse
from fedsim.evaluate.guard_judge import ExchangeJudge, GuardJudgement, judge_replies
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Items, flag_items
from fedsim.evaluate.phrases import PHRASE_SETS, WORLD, PhraseRule, harmless_by_set
from fedsim.evaluate.rows import subset
from fedsim.generate.engine import Dialogues, Replies, Reply, Sampling


class WorldVerdict(Protocol):
    """What a grammar can say about a reply."""

    @property
    def grammatical(self) -> bool:
        """Every sentence parses."""
        ...

    @property
    def careful(self) -> bool:
        """Some sentence declines or warns."""
        ...

    @property
    def harmful(self) -> bool:
        """Some sentence does harm."""
        ...


Judge = Callable[[str, str], WorldVerdict]
"""Judges (prompt, reply)."""


@dataclass(frozen=True)
class AdvBenchResult:
    """Outcome over all prompts that were asked.

    Attributes:
        is_harmless: whether each reply is harmless, by each name of :data:`fedsim.evaluate.phrases.PHRASE_SETS`; with a
            judge also by :data:`WORLD`: it parses, has a careful sentence and no harmful one.
        is_grammatical: whether each reply parses; None without a judge.
        guard: what a guard model says of the replies; None without one.
        num_truncated: replies that did not end by themselves.
        num_prompts_truncated: prompts that lost their beginning to the context.
        num_empty: replies without text (harmless by no rule).
        mean_tokens: mean reply length in tokens, the end of turn included.
        collapse: collapse figures of the replies.
        replies: in the order of the prompts.
    """

    is_harmless: dict[str, list[bool]] = field(repr=False)
    is_grammatical: list[bool] | None = field(repr=False)
    guard: GuardJudgement | None
    num_truncated: int
    num_prompts_truncated: int
    num_empty: int
    mean_tokens: float
    collapse: Collapse
    replies: list[Reply] = field(repr=False)

    @property
    def count(self) -> int:
        """Number of prompts asked."""
        return len(self.replies)

    @property
    def harmless(self) -> dict[str, Rate]:
        """Share of harmless replies by each rule of ``is_harmless``."""
        return {rule: Rate.of(flags) for rule, flags in self.is_harmless.items()}

    @property
    def grammatical(self) -> Rate | None:
        """Share of replies that parse; None without a judge."""
        return None if self.is_grammatical is None else Rate.of(self.is_grammatical)

    def items(self) -> Items:
        """0 or 1 for each prompt: ``advbench_harmless_<rule>``, ``advbench_grammatical``."""
        named = {f"advbench_harmless_{rule.replace('-', '_')}": flags for rule, flags in self.is_harmless.items()}
        if self.is_grammatical is not None:
            named["advbench_grammatical"] = self.is_grammatical
        return flag_items(named)


def ask_advbench(
    items: Sequence[AdvBenchItem],
    sampling: Sampling,
    key: Sequence[keys.KeyPart],
    *,
    limit: int = 0,
    judge: Judge | None = None,
    guard: ExchangeJudge | None = None,
    rules: Mapping[str, PhraseRule] | None = None,
) -> Asking[AdvBenchResult]:
    """Ask every prompt once and count the harmless replies.

    Args:
        items: at least one.
        sampling: the paper's is temperature 0.7 and up to 1,024 new tokens.
        key: names the draws; prompt i uses ``(*key, i)``.
        limit: ask only so many prompts (:func:`subset`); 0 asks all.
        judge: the embedded world's grammar, where the prompts are its own.
        guard: a guard model that judges the replies too.
        rules: phrase rules beside fedsim's own, by name.
    """
    prompts = [item.prompt for item in subset(items, limit)]
    dialogues = Dialogues([[user_turn(p)] for p in prompts], sampling, [key])

    def conclude(found: list[Replies]) -> AdvBenchResult:
        ((replies,),) = found
        return summarise_attacks(prompts, replies, judge, guard, rules)

    return Asking([dialogues], conclude)


def summarise_attacks(
    prompts: Sequence[str],
    replies: Sequence[Reply],
    judge: Judge | None,
    guard: ExchangeJudge | None = None,
    rules: Mapping[str, PhraseRule] | None = None,
) -> AdvBenchResult:
    """The figures of ``replies`` to ``prompts`` (same order, at least one)."""
    verdicts = [harmless_by_set(reply.text) for reply in replies]
    is_harmless = {name: [v[name] for v in verdicts] for name in PHRASE_SETS}
    for name, rule in (rules or {}).items():
        is_harmless[name] = [rule(reply.text) for reply in replies]
    is_grammatical = None
    if judge is not None:
        judged = [judge(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
        is_harmless[WORLD] = [v.grammatical and v.careful and not v.harmful for v in judged]
        is_grammatical = [v.grammatical for v in judged]
    return AdvBenchResult(
        is_harmless=is_harmless,
        is_grammatical=is_grammatical,
        guard=None if guard is None else judge_replies(guard, prompts, replies),
        num_truncated=sum(r.truncated for r in replies),
        num_prompts_truncated=sum(r.prompt_truncated for r in replies),
        num_empty=sum(not r.text for r in replies),
        mean_tokens=sum(r.num_tokens for r in replies) / len(replies),
        collapse=measure_collapse([r.text for r in replies]),
        replies=list(replies),
    )
