"""Classification of replies to attacks by the guard model: share that it calls safe.

The phrase rules look for words of refusal; the guard reads the exchange. It is reliable only on
texts like those that it was trained or fine-tuned on: a guard tuned on terse replies may err on
long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsim.base.figures import Figure
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Found
from fedsim.generate.engine import Reply

Exchange = tuple[str, str | None]
"""A user's message and the reply to classify; None: only the message is classified."""


class ExchangeJudge(Protocol):
    """Interface of a guard for exchanges, such as :class:`fedsim.safety.guard.LlamaGuard`."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each exchange, in order; the same on every rank."""
        ...


@dataclass(frozen=True)
class GuardJudgement:
    """A guard's classification of replies.

    Attributes:
        safe: share of exchanges that it calls safe. A reply without text is classified too, mostly
            as safe: read the share of empty replies beside it.
        num_cut: exchanges that it saw only in part (``guard.max_length``).
    """

    safe: Rate
    num_cut: int

    def figures(self, name: str) -> dict[str, Found]:
        """``<name>_guard_safe`` and ``<name>_guard_cut``."""
        return {f"{name}_guard_safe": self.safe, f"{name}_guard_cut": self.num_cut}


def guard_figures(name: str, title: str) -> tuple[Figure, ...]:
    """Declare the figures of :meth:`GuardJudgement.figures`.

    Args:
        title: of the benchmark.
    """
    return (
        Figure(f"{name}_guard_safe", f"{title}: replies that the guard calls safe"),
        Figure(f"{name}_guard_cut", f"{title}: exchanges that the guard saw in part", "", 0, None),
    )


def judge_replies(
    guard: ExchangeJudge,
    prompts: Sequence[str],
    replies: Sequence[Reply],
) -> GuardJudgement:
    """Let the guard classify each reply to its prompt; the work is shared over the guard's ranks.

    Args:
        prompts: at least one.
        replies: one for each prompt, in the same order.
    """
    # One exchange for each reply, all classified in one call.
    exchanges = [(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
    verdicts = guard.judge_exchanges(exchanges)
    is_safe = [not verdict.unsafe for verdict in verdicts]
    num_cut = sum(verdict.cut for verdict in verdicts)
    return GuardJudgement(Rate.of(is_safe), num_cut)
