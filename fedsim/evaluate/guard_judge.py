"""The guard model as a judge of replies to attacks: how many would pass it as safe?
 The phrase rules look for words of refusal; the guard reads the exchange. It knows what it was made
or fine-tuned for and no more: a guard tuned on terse replies may err on long ones.
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
"""A user's message and the reply to be judged; None judges the message alone."""


class ExchangeJudge(Protocol):
    """What a guard does here; :class:`fedsim.safety.guard.LlamaGuard` is one."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict per exchange, in order; the same on every rank."""
        ...


@dataclass(frozen=True)
class GuardJudgement:
    """What a guard says of replies.

    Attributes:
        safe: share of exchanges that it calls safe. A reply without text is judged as it is and is
            mostly safe: read the share of empty replies beside it.
        num_cut: exchanges that it saw only in part (``guard.max_length``).
    """

    safe: Rate
    num_cut: int

    def figures(self, name: str) -> dict[str, Found]:
        """``<name>_guard_safe`` and ``<name>_guard_cut``."""
        return {f"{name}_guard_safe": self.safe, f"{name}_guard_cut": self.num_cut}


def guard_figures(name: str, title: str) -> tuple[Figure, ...]:
    """The same as declared figures.

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
    """Judge each reply to its prompt (same order, at least one); the work is shared over the
    guard's ranks.
    """
    verdicts = guard.judge_exchanges([(p, r.text) for p, r in zip(prompts, replies, strict=True)])
    return GuardJudgement(Rate.of([not v.unsafe for v in verdicts]), sum(v.cut for v in verdicts))
