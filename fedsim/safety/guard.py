"""Guards behind one interface: a language model that judges by its first token, the labels, the
labels with errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from transformers import PreTrainedModel

from fedsim.attention.prefix import Head, candidate_logits, common_length, read_head
from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.ranks import Ranks
from fedsim.data.chat import ChatFormat
from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.guard_judge import Exchange
from fedsim.fused.joint import hold_adapters
from fedsim.generate.score import check_sound
from fedsim.safety.guard_format import GuardFormat

PART: Final = 256
"""Rows that one rank tokenizes in a go."""


class Guard(ABC):
    """Judges rows of a client's data."""

    def prepare(self, rows: Sequence[SquareRow]) -> None:  # noqa: B027  may be left as it is
        """Learn from the labelled rows of the guard set, once before :meth:`judge` and on every
        rank alike.
        """

    @abstractmethod
    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """One verdict per row, in order, that depends on no other row; ranks share the rows."""


class NoGuard(Guard):
    """No filter: every row is safe."""

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """All safe, with probability 0 of "unsafe"."""
        return [Verdict(False, 0.0) for _ in rows]


class OracleGuard(Guard):
    """The labels themselves: what a perfect filter would do."""

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Red rows are unsafe."""
        return [Verdict(row.red, float(row.red)) for row in rows]


class NoisyOracleGuard(Guard):
    """The labels with errors at given rates; each row's error is drawn from the row's own key.

    Args:
        tpr: chance that a red row is called unsafe.
        fpr: chance that an acceptable row is called unsafe.
        seed: the run's seed.

    Raises:
        ConfigError: a rate is outside 0 … 1.
    """

    def __init__(self, tpr: float, fpr: float, seed: int) -> None:
        for name, rate in (("tpr", tpr), ("fpr", fpr)):
            if not 0 <= rate <= 1:
                raise ConfigError(f"guard.{name}={rate}: a chance lies between 0 and 1")
        self.tpr, self.fpr, self.seed = tpr, fpr, seed

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Verdicts with probability 0 or 1, independent of order and of the other rows."""
        called = [self._draw(row.row_id) < (self.tpr if row.red else self.fpr) for row in rows]
        return [Verdict(unsafe, float(unsafe)) for unsafe in called]

    def _draw(self, row_id: int) -> float:
        return keyed_random.derive(self.seed, "noisy_guard", row_id) / 2**63


def units_of(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in ascending order of length, cut into units of at most ``most`` tokens, or of one
    longer row.

    Rows of a unit are about equally long, and the units are those of the rows alone, however many
    ranks share them.
    """
    units: list[list[int]] = []
    size = most
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if size + lengths[i] > most:
            units.append([])
            size = 0
        units[-1].append(i)
        size += lengths[i]
    return units


class LlamaGuard(Guard):
    """A language model that judges as Llama Guard 3 does, by the first token of its verdict.

    ``unsafe_prob`` is the softmax over exactly the first tokens of "safe" and "unsafe", so that a
    threshold of 0.5 equals greedy decoding. The prompts' common head is read once per rank and
    call; rows are cut into fixed units.

    Args:
        model: a causal LM on its device, PEFT-wrapped or not; put into eval mode during calls.
        chat: the guard's chat format.
        ranks: who shares the work.
        policy: hazard categories, "llama_guard_3" or "square".
        batch_tokens: tokens of a unit, the common head left out.
        threshold: a row is unsafe from this probability on.
        max_length: prompt and verdict together; a longer conversation is cut at its end (see
            :class:`GuardFormat`).
        on_progress: called with (done, total) units of this rank.

    Raises:
        ConfigError: unknown policy, or ``max_length`` below the instruction's length.
        ModelError: a tokenizer that cannot tell the two words apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        ranks: Ranks,
        *,
        policy: str,
        batch_tokens: int,
        threshold: float,
        max_length: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.format = GuardFormat(chat, policy, max_length)
        self.ranks = ranks
        self.batch_tokens = batch_tokens
        self.threshold = threshold
        self.on_progress = on_progress

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Judge each row's response to its prompt."""
        return self.judge_exchanges([(row.prompt, row.response) for row in rows])

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge any exchanges, such as a model's replies to attack prompts."""
        if not exchanges:
            return []
        prompts = self._prompts(exchanges)
        probs = self._unsafe_probs(
            [ids for ids, _ in prompts],
            has_reply=exchanges[0][1] is not None,
        )
        return [
            Verdict.at(self.threshold, p, cut) for p, (_, cut) in zip(probs, prompts, strict=True)
        ]

    def _prompts(self, exchanges: Sequence[Exchange]) -> list[tuple[np.ndarray, bool]]:
        """Ids of each prompt and whether it was cut; ranks share the tokenizing, a third of a
        millisecond a row.
        """
        parts = [exchanges[start : start + PART] for start in range(0, len(exchanges), PART)]
        done = self.ranks.map(
            lambda part: [self.format.prompt(user, agent) for user, agent in part],
            parts,
        )
        return [prompt for part in done for prompt in part]

    def _unsafe_probs(self, prompts: list[np.ndarray], has_reply: bool) -> list[float]:
        """Probability of "unsafe" for each prompt, in order.

        The empty exchange is compared too, so that the head stays the instruction even if few rows
        happen to begin alike: its length, and with it the last bits of a result, hardly ever
        depends on what else is judged.
        """
        empty, _ = self.format.prompt("", "" if has_reply else None)
        num_shared = common_length([empty, *prompts])
        lengths = [len(prompt) - num_shared for prompt in prompts]
        units = units_of(lengths, self.batch_tokens)
        costs = [float(sum(lengths[i] for i in unit)) for unit in units]
        heads: list[Head] = []

        def compute(unit: list[int]) -> list[float]:
            if not heads:
                heads.append(read_head(self.model, empty[:num_shared]))
            tails = [prompts[i][num_shared:] for i in unit]
            pair = [self.format.safe_id, self.format.unsafe_id]
            logits = candidate_logits(self.model, heads[0], tails, pair).double()
            return [float(p) for p in torch.softmax(logits, dim=1)[:, 1]]

        was_training = self.model.training
        self.model.eval()
        try:
            with hold_adapters(self.model):
                done = self.ranks.map(compute, units, costs, self._progress(len(units)))
        finally:
            self.model.train(was_training)
        by_row = {
            i: p
            for unit, values in zip(units, done, strict=True)
            for i, p in zip(unit, values, strict=True)
        }
        probs = [by_row[i] for i in range(len(prompts))]
        check_sound(probs, "guard scoring")
        return probs

    def _progress(self, num_units: int) -> Callable[[int], None] | None:
        report = self.on_progress
        if report is None:
            return None
        share = -(-num_units // self.ranks.size)
        return lambda done: report(done, share)
