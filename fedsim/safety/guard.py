"""Guards behind one interface: a language model, the labels themselves, and labels with errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
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
"""Rows of a unit of tokenisation, which one rank computes."""


class Guard(ABC):
    """Classifier of rows of a client's data."""

    def prepare(self, rows: Sequence[SquareRow]) -> None:  # noqa: B027
        """Learn from the guard set's labelled rows; called once before :meth:`judge`, on all ranks.

        The default does nothing, for guards that do not learn.
        """

    @abstractmethod
    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Return one verdict per row, in order.

        A verdict must depend on no other row, as ranks share the rows.
        """


class NoGuard(Guard):
    """No filter: every row is safe."""

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Call every row safe, with probability 0 of "unsafe"."""
        return [Verdict(False, 0.0) for _ in rows]


class OracleGuard(Guard):
    """The labels themselves, as a perfect guard would give them."""

    def judge(self, rows: Sequence[SquareRow]) -> list[Verdict]:
        """Call red rows unsafe, and no others."""
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
        """Return verdicts with probability 0 or 1, independent of order and of the other rows."""
        verdicts = []
        for row in rows:
            rate = self.tpr if row.red else self.fpr  # of being called unsafe
            unsafe = self._draw(row.row_id) < rate
            verdicts.append(Verdict(unsafe, float(unsafe)))
        return verdicts

    def _draw(self, row_id: int) -> float:
        """Draw a row's uniform number in [0, 1)."""
        return keyed_random.derive(self.seed, "noisy_guard", row_id) / 2**63


def units_of(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cut rows, shortest first, into units of at most ``most`` tokens, or of one longer row.

    Rows of a unit are about equally long. The units depend only on the rows, not on the number of
    ranks that share them.

    Args:
        lengths: tokens of each row.
        most: tokens of a unit.

    Returns:
        Indices of each unit's rows.
    """
    units: list[list[int]] = []
    size = most  # tokens of the last unit; full at first, so that the first row opens one
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if size + lengths[i] > most:
            units.append([])
            size = 0
        units[-1].append(i)
        size += lengths[i]
    return units


class LlamaGuard(Guard):
    """A language model that classifies as Llama Guard 3 does, by the first token of its verdict.

    ``unsafe_prob`` is the softmax over exactly the first tokens of "safe" and "unsafe", so that a
    threshold of 0.5 equals greedy decoding. The prompts' common head is read once per rank and
    call; rows are cut into fixed units.

    Args:
        model: a causal LM on its device, PEFT-wrapped or not; put into eval mode during calls.
        chat: the guard's chat format.
        ranks: processes that share the work.
        policy: hazard categories, "llama_guard_3" or "square".
        batch_tokens: tokens of a unit, the common head left out.
        threshold: a row is unsafe from this probability on.
        max_length: prompt and verdict together; a longer conversation is cut at its end (see
            :class:`GuardFormat`).
        on_progress: called with (done, total) units of this rank.

    Raises:
        ConfigError: unknown policy, or ``max_length`` below the instruction's length.
        ModelError: the tokenizer gives both words the same first token.
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
        """Classify each row's response to its prompt."""
        return self.judge_exchanges([(row.prompt, row.response) for row in rows])

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Classify any exchanges, such as a model's replies to attack prompts."""
        if not exchanges:
            return []
        prompts = self._prompts(exchanges)
        has_reply = exchanges[0][1] is not None
        probs = self._unsafe_probs([ids for ids, _ in prompts], has_reply)
        verdicts = []
        for prob, (_, cut) in zip(probs, prompts, strict=True):
            verdicts.append(Verdict.at(self.threshold, prob, cut))
        return verdicts

    def _prompts(self, exchanges: Sequence[Exchange]) -> list[tuple[np.ndarray, bool]]:
        """Return the token ids of each prompt, and whether it was cut.

        Ranks share the tokenisation, which takes a third of a millisecond a row.
        """
        parts = [exchanges[start : start + PART] for start in range(0, len(exchanges), PART)]

        def tokenize(part: Sequence[Exchange]) -> list[tuple[np.ndarray, bool]]:
            return [self.format.prompt(user, agent) for user, agent in part]

        return list(chain.from_iterable(self.ranks.map(tokenize, parts)))

    def _unsafe_probs(self, prompts: list[np.ndarray], has_reply: bool) -> list[float]:
        """Compute the probability of "unsafe" for each prompt, in order.

        Args:
            prompts: token ids of each, int32 ``[length]``.
            has_reply: the exchanges have replies, not only prompts.
        """
        # The prefix that all prompts share. The empty exchange is compared too, so that it stays
        # the instruction where few rows begin with the same words: its length, and with it the last
        # bits of a result, hardly ever depends on the other rows.
        empty, _ = self.format.prompt("", "" if has_reply else None)
        num_shared = common_length([empty, *prompts])
        lengths = [len(prompt) - num_shared for prompt in prompts]
        units = units_of(lengths, self.batch_tokens)
        costs = []  # tokens of each unit
        for unit in units:
            costs.append(float(sum(lengths[i] for i in unit)))
        pair = [self.format.safe_id, self.format.unsafe_id]
        heads: list[Head] = []  # keys and values of the prefix, read on this rank's first unit

        def compute(unit: list[int]) -> list[float]:
            if not heads:
                heads.append(read_head(self.model, empty[:num_shared]))
            tails = [prompts[i][num_shared:] for i in unit]
            logits = candidate_logits(self.model, heads[0], tails, pair).double()  # [rows, 2]
            return [float(p) for p in torch.softmax(logits, dim=1)[:, 1]]

        # Ranks share the units; the model is put back into its mode.
        was_training = self.model.training
        self.model.eval()
        try:
            with hold_adapters(self.model):
                done = self.ranks.map(compute, units, costs, self._progress(len(units)))
        finally:
            self.model.train(was_training)

        # Back to the order of the prompts.
        by_row: dict[int, float] = {}
        for unit, values in zip(units, done, strict=True):
            by_row.update(zip(unit, values, strict=True))
        probs = [by_row[i] for i in range(len(prompts))]
        check_sound(probs, "guard scoring")
        return probs

    def _progress(self, num_units: int) -> Callable[[int], None] | None:
        """Return a function to be called with the number of units done on this rank."""
        report = self.on_progress
        if report is None:
            return None
        share = -(-num_units // self.ranks.size)  # units of a rank, at most
        return lambda done: report(done, share)
