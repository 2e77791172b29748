"""Constitutional AI on the global adapter: SFT, then DPO, in every round (paper §4.2).

One iteration is one SFT step and one DPO step on the same rows. A round runs its SFT steps first,
then its DPO steps over the same rows; one shuffled cursor goes on from round to round, so 1,250
iterations of 16 rows are an epoch of 20,000.
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
    """Result of a round's CAI.

    Attributes:
        adapter: the repaired global adapter, fp32 ``[size]``.
        metrics: ``cai/…`` figures.
    """

    adapter: torch.Tensor
    metrics: dict[str, float]


class Aligner:
    """CAI's two stages on the resident model, data-parallel over a lane.

    Args:
        trainer: model, flat adapter and optimizer, whose state is reset for each stage.
        rows: usable conversations.
        chat: the model's chat format.
        cai: the CAI configuration.
        seed: the run's seed.
        num_rounds: rounds of the run.
        pass_tokens: most tokens of a pass outside exact mode, those of DPO's reference not counted;
            0: ``micro_batch_size`` times the longest item.

    Attributes:
        pairs: the pairs that can be trained on.
        reasons: for each of ``rows``, why it gives no such pair; None where it gives one.

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
        # Keep the pairs that can be trained on, and the reasons against the others.
        self.pairs: list[Preference] = []
        self.reasons: list[str | None] = []
        for row in rows:
            pair = preference(chat, row, cai.max_length)
            reason = why_no_pair(chat, row, pair)
            self.reasons.append(reason)
            if reason is None:
                self.pairs.append(pair)
        if not self.pairs:
            limit = f"cai.max_length={cai.max_length}"
            raise Tally.of(self.reasons).none_left("CAI pairs", max_length=limit)

    @property
    def num_cut(self) -> int:
        """Pairs of which a reply was cut at ``cai.max_length``."""
        return sum(p.chosen.truncated or p.rejected.truncated for p in self.pairs)

    def is_due(self, round_idx: int) -> bool:
        """Return whether a round has CAI."""
        return self.cai.is_due(round_idx, self.num_rounds)

    @property
    def iterations(self) -> int:
        """Iterations of a round that has CAI; −1 in the configuration is an epoch, rounded up."""
        if self.cai.iterations == -1:
            return -(-len(self.pairs) // self.cai.batch_size)
        return self.cai.iterations

    def batches(self, round_idx: int) -> list[list[Preference]]:
        """Return the pairs of each iteration of a round that has CAI.

        The cursor goes on from the last such round; where these are epochs, each begins with an
        order of its own.
        """
        size, iterations = self.cai.batch_size, self.iterations
        step = len(self.pairs) if self.cai.iterations == -1 else iterations * size
        place = self.cai.num_stages(round_idx) * step  # of the cursor
        orders: dict[int, list[int]] = {}
        batches = []
        for _ in range(iterations):
            rows = [self._at(place + i, orders) for i in range(size)]
            batches.append([self.pairs[row] for row in rows])
            place += size
        return batches

    def align(
        self,
        adapter: torch.Tensor,
        round_idx: int,
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Alignment:
        """Run SFT on the revisions, then DPO of revisions against first responses.

        The DPO reference is the adapter at the beginning of DPO.

        Args:
            adapter: the global adapter, fp32 ``[size]``.
            round_idx: a round that has CAI.
            lane: shares the work.
            on_step: called with (steps done, steps of both stages).
        """
        batches = self.batches(round_idx)
        total = 2 * len(batches)
        report_sft: Callable[[int, int], None] | None = None
        report_dpo: Callable[[int, int], None] | None = None
        if on_step is not None:
            report_sft = _shifted(on_step, 0, total)
            report_dpo = _shifted(on_step, len(batches), total)
        flat = self.trainer.adapter
        flat.load(adapter)

        # Stage 1: SFT on prompt → revision.
        revisions = []
        for batch in batches:
            revisions.append([pair.chosen for pair in batch])
        sft = self.trainer.run(
            TrainingPlan(
                revisions,
                lambda step: self.cai.sft_lr,
                ("cai_sft", round_idx),
                what=f"CAI (SFT), round {round_number(round_idx)}",
                longest=self.cai.max_length,
                pass_tokens=self.pass_tokens,
            ),
            SftObjective(),
            lane,
            report_sft,
        )

        # Stage 2: DPO on the same rows, from the adapter of stage 1, which is also the reference.
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
            report_dpo,
        )
        return Alignment(flat.copy(), step_metrics(sft, dpo, len(batches)))

    def _at(self, place: int, orders: dict[int, list[int]]) -> int:
        """Return the pair's index at a place of the endless cursor: one keyed order an epoch.

        Args:
            orders: by epoch, filled as needed.
        """
        epoch, offset = divmod(place, len(self.pairs))
        if epoch not in orders:
            order = keyed_random.permutation(len(self.pairs), self.seed, "cai_rows", epoch)
            orders[epoch] = [int(i) for i in order]
        return orders[epoch][offset]


def _shifted(
    report: Callable[[int, int], None],
    first: int,
    total: int,
) -> Callable[[int, int], None]:
    """Return ``report`` for the steps of a stage before which ``first`` of ``total`` are done."""
    return lambda done, _: report(first + done, total)


def preference(chat: ChatFormat, row: CaiRow, max_length: int) -> Preference:
    """Return the red prompt with the revision (chosen) and the first response (rejected)."""

    def tokens(reply: str) -> TokenRow:
        return chat.training_row([user_turn(row.init_prompt), assistant_turn(reply)], max_length)

    return Preference(tokens(row.chosen), tokens(row.rejected))


def why_no_pair(chat: ChatFormat, row: CaiRow, pair: Preference) -> str | None:
    """Return the reason of ``usable.REASONS`` why a pair is of no use in training; None if it is.

    SFT needs a usable row of the revision, DPO one of each reply. Two replies that differ only
    behind the cut, or not at all once they are tokens, express no preference.
    """
    for tokens, reply in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
        reason = why_unusable(chat, tokens, reply)
        if reason is not None:
            return reason
    # Replies that differ only in text, or behind the cut.
    same = np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids)
    return "same_replies" if same else None


def fills(chat: ChatFormat, prompt: str, max_length: int) -> bool:
    """Return whether a question leaves no room for a reply in a row of ``max_length`` tokens."""
    return len(chat.prompt_ids([user_turn(prompt)])) >= max_length


def check_prompts(chat: ChatFormat, prompts: Sequence[str], max_length: int) -> None:
    """Check that a prompt leaves room for a reply, before conversations are generated.

    Raises:
        ConfigError: none does.
    """
    if all(fills(chat, prompt, max_length) for prompt in prompts):
        tally = Tally.of(["no_targets"] * len(prompts))
        raise tally.none_left("CAI rows", max_length=f"cai.max_length={max_length}")
