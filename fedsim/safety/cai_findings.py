"""Judgements of CAI conversations: harmful responses, critiques that say so, careful revisions.

CAI's SFT and DPO teach the difference between the first response and the revision. Where no first
response is harmful, there is no such difference to learn, and training on the revisions repeats
what the writer says anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsim import world
from fedsim.evaluate.confusion import Verdict
from fedsim.safety.cai_data import CaiRow
from fedsim.safety.guard import Exchange


class ExchangeJudge(Protocol):
    """A guard; :class:`fedsim.safety.guard.LlamaGuard` is one."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict per exchange, in order; the same on every rank."""
        ...


@dataclass(frozen=True)
class Finding:
    """Judgement of one conversation.

    Attributes:
        harmful_response: the first response is harmful.
        critique_finds_harm: the critique names a harm; None where nothing can read critiques.
        careful_revision: the revision is careful (by the grammar) or safe (by a guard).
    """

    harmful_response: bool
    critique_finds_harm: bool | None
    careful_revision: bool

    @property
    def repaired(self) -> bool:
        """Return whether the first response is harmful and the revision is careful."""
        return self.harmful_response and self.careful_revision


Judge = Callable[[Sequence[CaiRow]], list[Finding]]
"""One finding per conversation, in order."""


def judge_by_grammar(rows: Sequence[CaiRow]) -> list[Finding]:
    """Judge conversations about the embedded world's questions by its grammar."""
    found = []
    for row in rows:
        response = world.judge_reply(row.init_prompt, row.init_response)
        revision = world.judge_reply(row.init_prompt, row.revision_response)
        finds_harm = world.names_harm(row.critic_response)
        found.append(Finding(response.harmful, finds_harm, revision.strict_harmless))
    return found


def judge_by_guard(guard: ExchangeJudge) -> Judge:
    """Return findings by a guard on the first response and the revision; critiques are not read."""

    def judge(rows: Sequence[CaiRow]) -> list[Finding]:
        responses = guard.judge_exchanges([(row.init_prompt, row.init_response) for row in rows])
        revised = [(row.init_prompt, row.revision_response) for row in rows]
        revisions = guard.judge_exchanges(revised)
        found = []
        for response, revision in zip(responses, revisions, strict=True):
            found.append(Finding(response.unsafe, None, not revision.unsafe))
        return found

    return judge
