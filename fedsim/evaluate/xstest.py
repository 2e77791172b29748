"""XSTest (arXiv 2308.01263): how often are prompts refused that only sound harmful, and how often harmful ones?

It is the control for AdvBench, whose phrase rules reward a model that refuses everything. Replies are drawn as in its
paper, greedy and up to 256 tokens. Prompts and replies live in the result object alone and reach no terminal or log.

What counts as a refusal: on the 2,250 replies of five models that XSTest's authors publish with human labels, their own
rule ``xstest`` agrees with the label (full or partial refusal against compliance) on 90.4 % of the safe and 86.0 % of
the unsafe prompts, ``strict`` on 89.1 % and 73.6 %; ``openfedllm``, which seeks its phrases anywhere, on 84.0 % and
81.5 %, with three times as many false refusals of safe prompts. So ``xstest`` is the headline. Replies of the embedded
world begin with an opener such as thanks: there the headline is ``world``, its grammar (some sentence is careful).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedsim import keys
from fedsim.data.chat import user_turn
from fedsim.data.xstest import XsTestItem
from fedsim.evaluate.asking import Asking
from fedsim.evaluate.collapse import Collapse, measure_collapse
from fedsim.evaluate.guard_judge import ExchangeJudge, GuardJudgement, judge_replies
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Items, Metrics, collapse_metrics, flag_items, rate_metrics
from fedsim.evaluate.phrases import begins_as_xstest_refusal, harmless_by_set
from fedsim.evaluate.rows import subset
from fedsim.generate.engine import Dialogues, Replies, Reply, Sampling

MAX_NEW_TOKENS: Final = 256
"""Longest reply, as in XSTest's paper."""

Refuses = Callable[[str], bool]
"""Whether a reply refuses, by a grammar."""


@dataclass(frozen=True)
class XsTestPart:
    """Outcome over the safe or over the unsafe prompts.

    Attributes:
        is_refused: whether each prompt is refused, by rule: "xstest", the phrase sets, and "world" where there is a
            grammar. A reply without text is a refusal by none.
        headline: the rule that counts, one of these.
        by_type: share of refusals by the headline rule, by prompt type.
        guard: what a guard model says of the replies to unsafe prompts; else None.
    """

    is_refused: dict[str, list[bool]] = field(repr=False)
    headline: str
    by_type: dict[str, Rate]
    guard: GuardJudgement | None

    @property
    def refused(self) -> dict[str, Rate]:
        """Share of refusals by each rule."""
        return {rule: Rate.of(flags) for rule, flags in self.is_refused.items()}


@dataclass(frozen=True)
class XsTestResult:
    """Outcome over all prompts that were asked.

    Attributes:
        safe: None where no safe prompt was asked.
        unsafe: None where no unsafe prompt was asked.
        num_truncated: replies that did not end within the limit.
        num_prompts_truncated: prompts that lost their beginning to the context.
        num_empty: replies without text.
        mean_tokens: mean reply length in tokens, the end of turn included.
        collapse: collapse figures of all replies.
        replies: in the order of the prompts.
    """

    safe: XsTestPart | None
    unsafe: XsTestPart | None
    num_truncated: int
    num_prompts_truncated: int
    num_empty: int
    mean_tokens: float
    collapse: Collapse
    replies: list[Reply] = field(repr=False)

    def metrics(self) -> Metrics:
        """All figures as ``eval/xstest_…``, rates in percent with intervals and counts."""
        metrics: Metrics = {"eval/xstest_count": len(self.replies)}
        for name, part in (("safe", self.safe), ("unsafe", self.unsafe)):
            if part is not None:
                metrics |= _part_metrics(f"eval/xstest_{name}", part)
        metrics["eval/xstest_truncated"] = self.num_truncated
        metrics["eval/xstest_prompts_truncated"] = self.num_prompts_truncated
        metrics["eval/xstest_empty"] = self.num_empty
        metrics["eval/xstest_mean_tokens"] = self.mean_tokens
        return metrics | collapse_metrics("eval/xstest", self.collapse)

    def items(self) -> Items:
        """0 or 1 for each safe and each unsafe prompt by the headline rule: ``xstest_safe_refused`` and so on."""
        parts = {"safe": self.safe, "unsafe": self.unsafe}
        return flag_items({f"xstest_{k}_refused": p.is_refused[p.headline] for k, p in parts.items() if p is not None})


def ask_xstest(
    items: Sequence[XsTestItem],
    max_new_tokens: int,
    key: Sequence[keys.KeyPart],
    *,
    limit: int = 0,
    refuses: Refuses | None = None,
    guard: ExchangeJudge | None = None,
) -> Asking[XsTestResult]:
    """Ask every prompt once and count the refusals.

    Args:
        items: at least one.
        max_new_tokens: of a reply; at most :data:`MAX_NEW_TOKENS` are taken.
        key: of the draws, of which greedy decoding makes none.
        limit: ask only so many prompts (:func:`subset`); 0 asks all.
        refuses: the embedded world's grammar, where the prompts are its own; its word is then the headline.
        guard: a guard model that judges the replies to unsafe prompts too.
    """
    asked = subset(items, limit)
    sampling = Sampling(0.0, min(max_new_tokens, MAX_NEW_TOKENS))
    dialogues = Dialogues([[user_turn(item.prompt)] for item in asked], sampling, [key])

    def conclude(found: list[Replies]) -> XsTestResult:
        ((replies,),) = found
        return summarise_xstest(asked, replies, refuses, guard)

    return Asking([dialogues], conclude)


def summarise_xstest(
    items: Sequence[XsTestItem],
    replies: Sequence[Reply],
    refuses: Refuses | None = None,
    guard: ExchangeJudge | None = None,
) -> XsTestResult:
    """The figures of ``replies`` to ``items`` (same order, at least one)."""
    pairs = list(zip(items, replies, strict=True))
    return XsTestResult(
        safe=_part([pair for pair in pairs if pair[0].safe], refuses, None),
        unsafe=_part([pair for pair in pairs if not pair[0].safe], refuses, guard),
        num_truncated=sum(r.truncated for r in replies),
        num_prompts_truncated=sum(r.prompt_truncated for r in replies),
        num_empty=sum(not r.text for r in replies),
        mean_tokens=sum(r.num_tokens for r in replies) / len(replies),
        collapse=measure_collapse([r.text for r in replies]),
        replies=list(replies),
    )


def _part(
    pairs: Sequence[tuple[XsTestItem, Reply]], refuses: Refuses | None, guard: ExchangeJudge | None
) -> XsTestPart | None:
    if not pairs:
        return None
    verdicts = [_refused(reply.text, refuses) for _, reply in pairs]
    headline = "xstest" if refuses is None else "world"
    by_type: dict[str, list[bool]] = {}
    for (item, _), verdict in zip(pairs, verdicts, strict=True):
        by_type.setdefault(item.kind, []).append(verdict[headline])
    judged = None if guard is None else judge_replies(guard, [i.prompt for i, _ in pairs], [r for _, r in pairs])
    return XsTestPart(
        is_refused={rule: [v[rule] for v in verdicts] for rule in verdicts[0]},
        headline=headline,
        by_type={kind: Rate.of(flags) for kind, flags in by_type.items()},
        guard=judged,
    )


def _refused(reply: str, refuses: Refuses | None) -> dict[str, bool]:
    """Whether each rule calls the reply a refusal."""
    rules = {"xstest": begins_as_xstest_refusal(reply), **harmless_by_set(reply)}
    return rules if refuses is None else rules | {"world": refuses(reply)}


def _part_metrics(name: str, part: XsTestPart) -> Metrics:
    metrics = rate_metrics(f"{name}_refused", part.refused[part.headline])
    metrics[f"{name}_count"] = part.refused[part.headline].total
    for rule, rate in part.refused.items():
        metrics |= rate_metrics(f"{name}_refused_{rule.replace('-', '_')}", rate)
    for kind, rate in part.by_type.items():
        typed = f"eval/xstest_type_{re.sub('[^a-z0-9]+', '_', kind.casefold())}_refused"
        metrics |= rate_metrics(typed, rate) | {f"{typed}_count": rate.total}
    return metrics if part.guard is None else metrics | part.guard.metrics(name)
