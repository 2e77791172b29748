"""Perplexity of held-out helpful replies: how well the model still predicts them.

It shows forgetting early, as it depends on no draw, no rule and no judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from fedsim import world
from fedsim.base.errors import DataError
from fedsim.base.figures import Figure
from fedsim.config import EvalConfig
from fedsim.config.measuring import EMBEDDED
from fedsim.data.chat import ChatFormat, Conversation, TokenRow, as_key
from fedsim.data.helpful import load_helpful
from fedsim.data.usable import why_unusable
from fedsim.evaluate.benchmark import EmbeddedFile, OwnBenchmark, Result
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.evaluate.intervals import t_95
from fedsim.evaluate.measures import Found
from fedsim.evaluate.scoring import scored_row
from fedsim.generate.engine import Engine, Replies, RowScore


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log-likelihood / total target tokens), with its 95 % interval.

    Attributes:
        value: perplexity, at least 1; infinite where it exceeds the largest float.
        low: lower end of the interval; equal to ``value`` for one conversation, which allows no
            interval.
        high: upper end.
        num_tokens: target tokens, the end of turn of each reply included.
        num_conversations: conversations.
        num_truncated: conversations cut to the context.
        num_dropped: further conversations, of whose reply no token is left.
    """

    value: float
    low: float
    high: float
    num_tokens: int
    num_conversations: int
    num_truncated: int
    num_dropped: int = 0

    def figures(self) -> dict[str, Found]:
        """Name the perplexity with its interval, and the counts of conversations and tokens."""
        # One conversation gives no interval.
        found: dict[str, Found] = {"perplexity": self.value}
        if self.num_conversations > 1:
            found |= {"perplexity_low": self.low, "perplexity_high": self.high}
        found |= {
            "perplexity_count": self.num_conversations,
            "perplexity_target_tokens": self.num_tokens,
        }
        if self.num_dropped:
            found["perplexity_dropped"] = self.num_dropped
        return found | {"perplexity_truncated": self.num_truncated}


@dataclass(frozen=True)
class HelpfulPerplexity(OwnBenchmark):
    """Held-out helpful conversations: perplexity of the last reply of each."""

    name = "helpful"
    title = "helpful conversations"
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("perplexity", "perplexity of helpful replies", "", 2, None),
        Figure("perplexity_target_tokens", "tokens behind the perplexity", "", 0, None),
        Figure("perplexity_dropped", "conversations of whose reply no token is left", "", 0, None),
        Figure("perplexity_truncated", "conversations cut to the context", "", 0, None),
    )
    embedded: ClassVar[Mapping[str, EmbeddedFile]] = {
        EMBEDDED: EmbeddedFile("world-helpful", "helpful.jsonl", world.write_helpful),
    }

    @classmethod
    def from_config(cls, settings: EvalConfig, *, judged: bool) -> Self:
        return cls()

    def load(self, path: Path) -> list[Conversation]:
        return load_helpful(path)

    def measure(
        self,
        engine: Engine,
        items: Sequence[Conversation],
        replies: Sequence[Replies],
        guard: ExchangeJudge | None = None,
    ) -> Result:
        return Result(run_perplexity(engine, items).figures())


def run_perplexity(engine: Engine, conversations: Sequence[Conversation]) -> Perplexity:
    """Score the last reply of every conversation, given all messages before it.

    Earlier replies are only context, as in training: a file in which every turn counts has a line
    for each.

    Args:
        engine: the model under test.
        conversations: at least one; each ends with an assistant turn. A prompt too long for the
            engine's context loses its beginning, a reply longer than half of it its end; both are
            counted. A reply without anything to predict is dropped.

    Raises:
        DataError: no conversation is left.
    """
    rows = []  # one for each conversation; the reply's tokens are the targets
    for conversation in conversations:
        row = _row(engine.chat, conversation, engine.max_context)
        if why_unusable(engine.chat, row, conversation[-1]["content"]) is None:
            rows.append(row)
    if not rows:
        raise DataError(
            "eval.helpful: the tokenizer keeps nothing of the last reply of any of the "
            f"{len(conversations)} conversations; give another file, or eval.helpful='' to leave "
            "it out",
        )
    num_truncated = sum(row.truncated for row in rows)
    found = summarise_scores(engine.score(rows, "eval.helpful"), num_truncated)
    return replace(found, num_dropped=len(conversations) - len(rows))


def summarise_scores(scores: Sequence[RowScore], num_truncated: int) -> Perplexity:
    """Compute the perplexity over scored rows and its 95 % interval.

    The interval is the delta method's for a ratio of sums, with conversations as the sampled units,
    as tokens of one reply depend on each other: residuals e_i = nll_i − R·t_i,
    s² = n/(n − 1) · Σ e_i² / (Σ t_i)², and exp(R ± t(0.975, n − 1) · s) with R the mean nll per
    token (Cochran, Sampling Techniques, §6.4). Sums are exact (``fsum``).

    Args:
        scores: one for each row, of at least one target each.
        num_truncated: rows cut to the context.
    """
    nll = [-score.logprob for score in scores]  # nats, one for each row
    tokens = [score.num_targets for score in scores]
    total, n = sum(tokens), len(scores)
    assert n > 0 and min(tokens) > 0, "perplexity needs target tokens"
    mean = math.fsum(nll) / total  # nats per token

    # Half of the interval's width in nats per token.
    half = 0.0
    if n > 1:
        squares = math.fsum((loss - mean * t) ** 2 for loss, t in zip(nll, tokens, strict=True))
        half = t_95(n - 1) * math.sqrt(n / (n - 1) * squares) / total
    low = mean - half
    if low < 0.0:  # a perplexity below 1 does not exist; NaN stays NaN
        low = 0.0
    return Perplexity(_exp(mean), _exp(low), _exp(mean + half), total, n, num_truncated)


def _row(chat: ChatFormat, conversation: Conversation, max_context: int) -> TokenRow:
    """Make the row of a conversation: the last reply and its end of turn are the targets.

    The ids are the same as in training.
    """

    def compute() -> TokenRow:
        # Not cut here: scored_row cuts the prompt, where training would cut the reply.
        whole = chat.training_row(conversation, max_length=10**9)
        ids, targets = whole.input_ids, whole.loss_mask
        return scored_row(ids[~targets], ids[targets], max_context)

    return chat.remember(("last reply", as_key(conversation), max_context), compute)


def _exp(value: float) -> float:
    """Exponentiate; infinity where the result exceeds the largest float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
