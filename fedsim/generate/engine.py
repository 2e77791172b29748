"""Batched sampling and scoring over the ranks, used by the guard, CAI and every evaluation.

Rows are sorted by length and cut into fixed units of ``batch_size`` rows; a unit is computed the same way on whichever
rank it lands, and each row draws from its own key, so the number of ranks changes no token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from fedsim import keys
from fedsim.data.chat import ChatFormat, Conversation, TokenRow
from fedsim.generate.decode import decode_unit
from fedsim.generate.score import score_unit
from fedsim.model.cost import Work, decode_work, rows_work
from fedsim.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        max_new_tokens: a reply that has not ended by then is cut and counted as truncated; at most half of the
            engine's context.
    """

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """One generated reply.

    Attributes:
        text: decoded without special tokens, stripped.
        num_tokens: generated tokens, the end-of-turn token included.
        truncated: it did not end within ``max_new_tokens`` (or the context).
        prompt_truncated: the prompt was longer than the context and lost its beginning.
    """

    text: str
    num_tokens: int
    truncated: bool
    prompt_truncated: bool = False


@dataclass(frozen=True)
class RowScore:
    """Sum of a row's target log-probabilities (natural log) and how many targets there were."""

    logprob: float
    num_targets: int

    @property
    def mean(self) -> float:
        """Mean log-probability of a target token; −inf for a row without targets."""
        return self.logprob / self.num_targets if self.num_targets else float("-inf")


class Engine:
    """Generation and scoring with one model, whatever adapter it holds at the time of the call.

    Args:
        model: a causal LM (PEFT-wrapped or not) on its device; put into eval mode during calls.
        chat: the model's chat format.
        ranks: who shares the work.
        batch_size: rows of a unit.
        max_context: prompt and reply together may have this many tokens.
        seed: the run's seed; with the call's key it fixes every draw.
        on_progress: called with (done, total) units of this rank.

    Attributes:
        work: what all ranks together have computed since :meth:`pop_work` was last called.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        ranks: Ranks,
        *,
        batch_size: int,
        max_context: int,
        seed: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.chat = chat
        self.ranks = ranks
        self.batch_size = batch_size
        self.max_context = max_context
        self.seed = seed
        self.on_progress = on_progress
        self.work = Work()

    def pop_work(self) -> Work:
        """What all ranks have computed since the last call."""
        done, self.work = self.work, Work()
        return done

    def generate(
        self, conversations: Sequence[Conversation], sampling: Sampling, key: Sequence[keys.KeyPart]
    ) -> list[Reply]:
        """One reply per conversation, in order.

        Args:
            conversations: each ends with a user turn.
            key: names the draws, such as ``("advbench", round_idx)``; row i uses ``(*key, i)``.
        """
        num_new = min(sampling.max_new_tokens, self.max_context // 2)
        room = self.max_context - num_new
        prompts = [self.chat.prompt_ids(c) for c in conversations]
        kept = [p[-room:] for p in prompts]
        units = self._units([len(p) for p in kept])

        def compute(unit: list[int]) -> list[tuple[list[int], bool]]:
            seeds = [keys.derive(self.seed, "sample", *key, i) for i in unit]
            return decode_unit(
                self.model,
                [kept[i] for i in unit],
                seeds,
                temperature=sampling.temperature,
                max_new_tokens=num_new,
                eos_ids=self._eos_ids(),
            )

        rows = self._run(compute, units, [float(sum(len(kept[i]) for i in u)) for u in units], len(prompts))
        self.work += decode_work([[(len(kept[i]), len(rows[i][0])) for i in unit] for unit in units])
        return [
            Reply(self.chat.decode(ids), len(ids), not ended, len(prompts[i]) > room)
            for i, (ids, ended) in enumerate(rows)
        ]

    def score(self, rows: Sequence[TokenRow]) -> list[RowScore]:
        """Log-probability of each row's targets (tokens with ``loss_mask``), in order."""
        units = self._units([len(r) for r in rows])

        def compute(unit: list[int]) -> list[float]:
            return score_unit(self.model, [rows[i] for i in unit])

        sums = self._run(compute, units, [float(sum(len(rows[i]) for i in u)) for u in units], len(rows))
        self.work += rows_work(rows, passes=len(units))
        return [RowScore(value, row.num_targets) for value, row in zip(sums, rows, strict=True)]

    def _units(self, lengths: Sequence[int]) -> list[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _run(
        self, compute: Callable[[list[int]], list[T]], units: list[list[int]], costs: list[float], num_rows: int
    ) -> list[T]:
        was_training = self.model.training
        self.model.eval()
        try:
            done = self.ranks.map(compute, units, costs, self._progress(len(units)))
        finally:
            self.model.train(was_training)
        out: list[T | None] = [None] * num_rows
        for unit, values in zip(units, done, strict=True):
            for i, value in zip(unit, values, strict=True):
                out[i] = value
        return [v for v in out if v is not None]

    def _progress(self, num_units: int) -> Callable[[int], None] | None:
        report = self.on_progress
        if report is None:
            return None
        share = -(-num_units // self.ranks.size)
        return lambda done: report(done, share)

    def _eos_ids(self) -> frozenset[int]:
        """End-of-turn ids: the chat format's and all that the model's generation config names (Llama 3 has three)."""
        named = getattr(self.model, "generation_config", None)
        ids = getattr(named, "eos_token_id", None)
        extra = [ids] if isinstance(ids, int) else list(ids or [])
        return self.chat.end_ids | frozenset(map(int, extra))
