"""Perplexity of held-out helpful replies: how well the model still predicts them, whatever a judge would say.

Forgetting shows here first: no draw, no rule and no judge stands between the model and the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsim.data.chat import ChatFormat, Conversation, TokenRow, as_key
from fedsim.data.usable import why_unusable
from fedsim.errors import DataError
from fedsim.evaluate.intervals import t_95
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.rows import scored_row, subset
from fedsim.generate.engine import Engine, RowScore


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log-likelihood / total target tokens), with its 95 % interval.

    Attributes:
        value: perplexity, at least 1; infinite where it exceeds the largest float.
        low: lower end of the interval; equal to ``value`` for one conversation, which allows no interval.
        high: upper end.
        num_tokens: target tokens, the end of turn of each reply included.
        num_conversations: conversations.
        num_truncated: conversations cut to the context.
        num_dropped: further conversations, whose reply the tokenizer keeps nothing of.
    """

    value: float
    low: float
    high: float
    num_tokens: int
    num_conversations: int
    num_truncated: int
    num_dropped: int = 0

    def metrics(self) -> Metrics:
        """``eval/perplexity`` with interval, counts of conversations and tokens, and how many were cut."""
        name = "eval/perplexity"
        interval: Metrics = {f"{name}_low": self.low, f"{name}_high": self.high} if self.num_conversations > 1 else {}
        counts: Metrics = {f"{name}_count": self.num_conversations, f"{name}_target_tokens": self.num_tokens}
        if self.num_dropped:
            counts[f"{name}_dropped"] = self.num_dropped
        return {name: self.value, **interval, **counts, f"{name}_truncated": self.num_truncated}


def run_perplexity(engine: Engine, conversations: Sequence[Conversation], *, limit: int = 0) -> Perplexity:
    """Score the last reply of every conversation (at least one), given all that stands before it.

    Earlier replies are context alone, as in training: a file whose every turn counts has a line for each.

    Args:
        engine: the model under test.
        conversations: each ends with an assistant turn. A prompt too long for the engine's context loses its beginning,
            a reply longer than half of it its end; both are counted. A reply without anything to predict is dropped.
        limit: score only so many (:func:`subset`); 0 scores all.

    Raises:
        DataError: no conversation is left.
    """
    chosen = subset(conversations, limit)
    rows = []
    for conversation in chosen:
        row = _row(engine.chat, conversation, engine.max_context)
        if why_unusable(engine.chat, row, conversation[-1]["content"]) is None:
            rows.append(row)
    if not rows:
        raise DataError(
            f"eval.helpful: the tokenizer keeps nothing of the last reply of any of the {len(chosen)} conversations; "
            "give another file, or eval.helpful='' to leave it out"
        )
    found = summarise_scores(engine.score(rows, "eval.helpful"), sum(row.truncated for row in rows))
    return replace(found, num_dropped=len(chosen) - len(rows))


def summarise_scores(scores: Sequence[RowScore], num_truncated: int) -> Perplexity:
    """Perplexity over the rows (at least one target each).

    The interval is the delta method's for a ratio of sums, with conversations as the sampled units, as tokens of one
    reply depend on each other: residuals e_i = nll_i − R·t_i, s² = n/(n − 1) · Σ e_i² / (Σ t_i)², and exp(R ± t(0.975,
    n − 1) · s) with R the mean nll a token (Cochran, Sampling Techniques, §6.4). Sums are exact (``fsum``).
    """
    nll = [-score.logprob for score in scores]
    tokens = [score.num_targets for score in scores]
    total, n = sum(tokens), len(scores)
    assert n > 0 and min(tokens) > 0, "perplexity needs target tokens"
    mean = math.fsum(nll) / total
    half = 0.0
    if n > 1:
        squares = math.fsum((loss - mean * t) ** 2 for loss, t in zip(nll, tokens, strict=True))
        half = t_95(n - 1) * math.sqrt(n / (n - 1) * squares) / total
    low = mean - half
    low = 0.0 if low < 0.0 else low  # a perplexity below 1 does not exist; NaN stays NaN
    return Perplexity(_exp(mean), _exp(low), _exp(mean + half), total, n, num_truncated)


def _row(chat: ChatFormat, conversation: Conversation, max_context: int) -> TokenRow:
    """The last reply and its end of turn as targets, by the same ids as in training."""

    def compute() -> TokenRow:
        whole = chat.training_row(conversation, max_length=10**9)
        ids, targets = whole.input_ids, whole.loss_mask
        return scored_row(ids[~targets], ids[targets], max_context)

    return chat.remember(("last reply", as_key(conversation), max_context), compute)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
