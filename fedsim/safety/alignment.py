"""Constitutional AI on the global adapter: an SFT stage and a DPO stage in every round (paper §4.2).

One iteration is one SFT step and one DPO step on the same rows. A round runs its SFT steps first, then its DPO steps
over the same rows; one shuffled cursor goes on from round to round, so 1,250 iterations of 16 rows are an epoch of
20,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.base import keyed_random
from fedsim.base.metric import Metric, writes
from fedsim.base.ranks import Lane
from fedsim.base.rounds import round_number
from fedsim.config import CaiConfig
from fedsim.data.chat import ChatFormat, TokenRow, assistant_turn, user_turn
from fedsim.data.usable import Tally, why_unusable
from fedsim.safety.cai_data import CaiRow
from fedsim.train.loop import Trainer, TrainingPlan, TrainingStats
from fedsim.train.objectives import DpoObjective, Preference, SftObjective


@writes(
    Metric("cai/sft_loss", "mean loss of the SFT steps", "nats per token"),
    Metric("cai/dpo_loss", "mean loss of the DPO steps", "nats per pair"),
    Metric("cai/reward_margin", "chosen minus rejected reward, mean over the pairs", "nats"),
    Metric("cai/reward_accuracy", "pairs with a positive margin", "share, 0 to 1"),
    Metric("cai/chosen_reward", "reward of the revisions, mean over the pairs", "nats"),
    Metric("cai/rejected_reward", "reward of the first responses, mean over the pairs", "nats"),
    Metric("cai/num_iterations", "CAI iterations of the round", "iterations"),
    Metric("cai/num_tokens", "tokens of both kinds of steps, DPO's reference included", "tokens"),
)
def step_metrics(sft: TrainingStats, dpo: TrainingStats, num_iterations: int) -> dict[str, float]:
    """Losses and rewards of a round's SFT and DPO steps."""
    return {
        "cai/sft_loss": sft.mean_loss,
        "cai/dpo_loss": dpo.mean_loss,
        **{f"cai/{name}": dpo.mean(name) for name in dpo.stats},
        "cai/num_iterations": num_iterations,
        "cai/num_tokens": sft.num_tokens + dpo.num_tokens,
    }


@dataclass(frozen=True)
class Alignment:
    """What a round of CAI did.

    Attributes:
        adapter: the repaired global adapter, fp32 ``[size]``.
        metrics: ``cai/…`` figures.
    """

    adapter: torch.Tensor
    metrics: dict[str, float]


class Aligner:
    """Runs CAI's two stages on the resident model, data-parallel over a lane.

    Args:
        trainer: model, flat adapter and optimizer; the optimizer starts anew in each stage.
        rows: usable conversations.
        chat: the model's chat format.
        cai: the CAI configuration.
        seed: the run's seed.
        num_rounds: rounds of the run.
        pass_tokens: most tokens of a pass outside exact mode, those of DPO's reference not counted; 0:
            ``micro_batch_size`` times the longest item.

    Attributes:
        pairs: the pairs that can be trained on.
        reasons: why each of ``rows`` gives no such pair; None where it gives one.

    Raises:
        ConfigError: no row gives a pair.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Sequence[CaiRow],
        chat: ChatFormat,
        cai: CaiConfig,
        seed: int,
        num_rounds: int,
        pass_tokens: int = 0,
    ) -> None:
        assert rows, "CAI needs conversations"
        self.trainer = trainer
        self.cai = cai
        self.seed = seed
        self.num_rounds = num_rounds
        self.pass_tokens = pass_tokens
        pairs = [preference(chat, row, cai.max_length) for row in rows]
        self.reasons = [why_no_pair(chat, row, pair) for row, pair in zip(rows, pairs, strict=True)]
        self.pairs = [p for p, reason in zip(pairs, self.reasons, strict=True) if reason is None]
        if not self.pairs:
            raise Tally.of(self.reasons).none_left("CAI pairs", max_length=f"cai.max_length={cai.max_length}")

    @property
    def num_cut(self) -> int:
        """Pairs of which a reply was cut at ``cai.max_length``."""
        return sum(p.chosen.truncated or p.rejected.truncated for p in self.pairs)

    def is_due(self, round_idx: int) -> bool:
        """Return whether a round has CAI."""
        return self.cai.is_due(round_idx, self.num_rounds)

    @property
    def iterations(self) -> int:
        """Iterations of a round that has CAI; an epoch, where it is asked for, ends with the batch of the last row."""
        return -(-len(self.pairs) // self.cai.batch_size) if self.cai.iterations == -1 else self.cai.iterations

    def batches(self, round_idx: int) -> list[list[Preference]]:
        """The rows of each iteration of a round that has CAI.

        The cursor goes on from the stage before; where stages are epochs, each begins with an order of its own.
        """
        size, iterations = self.cai.batch_size, self.iterations
        step = len(self.pairs) if self.cai.iterations == -1 else iterations * size
        first = self.cai.num_stages(round_idx) * step
        orders: dict[int, list[int]] = {}
        return [[self.pairs[self._at(first + t * size + i, orders)] for i in range(size)] for t in range(iterations)]

    def align(
        self,
        adapter: torch.Tensor,
        round_idx: int,
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Alignment:
        """SFT on the revisions, then DPO of revisions against first responses, from ``adapter`` on.

        The DPO reference is the adapter as it stands when DPO begins.

        Args:
            on_step: called with (steps done, steps of both stages).
        """
        batches = self.batches(round_idx)
        total = 2 * len(batches)
        flat = self.trainer.adapter
        flat.load(adapter)
        sft = self.trainer.run(
            TrainingPlan(
                [[pair.chosen for pair in batch] for batch in batches],
                lambda step: self.cai.sft_lr,
                ("cai_sft", round_idx),
                what=f"CAI (SFT), round {round_number(round_idx)}",
                longest=self.cai.max_length,
                pass_tokens=self.pass_tokens,
            ),
            SftObjective(),
            lane,
            None if on_step is None else lambda done, _: on_step(done, total),
        )
        dpo = self.trainer.run(
            TrainingPlan(
                batches,
                lambda step: self.cai.dpo_lr,
                ("cai_dpo", round_idx),
                what=f"CAI (DPO), round {round_number(round_idx)}",
                longest=4 * self.cai.max_length,  # two rows, for the policy and for the reference
                pass_tokens=2 * self.pass_tokens,
            ),
            DpoObjective(flat, flat.copy(), self.cai.beta),
            lane,
            None if on_step is None else lambda done, _: on_step(len(batches) + done, total),
        )
        return Alignment(flat.copy(), step_metrics(sft, dpo, len(batches)))

    def _at(self, place: int, orders: dict[int, list[int]]) -> int:
        """Row at a place of the endless cursor: one keyed order after another."""
        epoch, offset = divmod(place, len(self.pairs))
        if epoch not in orders:
            orders[epoch] = [int(i) for i in keyed_random.permutation(len(self.pairs), self.seed, "cai_rows", epoch)]
        return orders[epoch][offset]


def preference(chat: ChatFormat, row: CaiRow, max_length: int) -> Preference:
    """The red prompt with the revision (chosen) and the first response (rejected)."""

    def tokens(reply: str) -> TokenRow:
        return chat.training_row([user_turn(row.init_prompt), assistant_turn(reply)], max_length)

    return Preference(tokens(row.chosen), tokens(row.rejected))


def why_no_pair(chat: ChatFormat, row: CaiRow, pair: Preference) -> str | None:
    """Name the reason of ``usable.REASONS`` why a pair cannot teach anything; None for one that can.

    SFT needs a usable row of the revision, DPO one of each reply. Two replies that differ only behind the cut, or not
    at all once they are tokens, prefer nothing.
    """
    for tokens, reply in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
        reason = why_unusable(chat, tokens, reply)
        if reason is not None:
            return reason
    same = np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids)
    return "same_replies" if same else None


def fills(chat: ChatFormat, prompt: str, max_length: int) -> bool:
    """True if a question leaves no room for a reply in a row of ``max_length`` tokens."""
    return len(chat.prompt_ids([user_turn(prompt)])) >= max_length


def check_prompts(chat: ChatFormat, prompts: Sequence[str], max_length: int) -> None:
    """Check that one of the prompts leaves room for a reply, before conversations are written from them.

    Raises:
        ConfigError: none does.
    """
    if all(fills(chat, prompt, max_length) for prompt in prompts):
        raise Tally.of(["no_targets"] * len(prompts)).none_left("CAI rows", max_length=f"cai.max_length={max_length}")
