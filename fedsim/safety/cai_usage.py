"""Counts of CAI's usable and dropped conversations, and the length of an epoch over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.base.errors import ConfigError
from fedsim.base.metric import Metric, writes
from fedsim.config import CaiConfig
from fedsim.data.usable import Tally, drop_metrics
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import CaiRow

TOKEN_DROPS = ("no_targets", "empty_reply", "same_replies")
"""Reasons that the tokens of a conversation decide."""

WARN_ABOVE = 0.1
"""Share of dropped conversations above which a run warns."""


def limits(cai: CaiConfig) -> dict[str, str]:
    """Return the settings for which conversations are dropped, as messages name them."""
    return {
        "max_length": f"cai.max_length={cai.max_length}",
        "max_new_tokens": f"cai.max_new_tokens={cai.max_new_tokens}",
    }


def none_usable(conversations: Sequence[CaiRow], cai: CaiConfig) -> ConfigError:
    """Return the error for conversations that all have a defect."""
    tally = Tally.of(row.defect for row in conversations)
    return tally.none_left("CAI conversations", **limits(cai))


@dataclass(frozen=True)
class CaiUsage:
    """Counts of the conversations that were asked for.

    Attributes:
        tally: counts of the conversations.
        cai: the CAI configuration.
    """

    tally: Tally
    cai: CaiConfig

    @classmethod
    def of(cls, conversations: Sequence[CaiRow], aligner: Aligner) -> CaiUsage:
        """Count conversations with a defect, and those whose tokens make no pair.

        Args:
            aligner: made from the conversations without a defect.
        """
        # Rows with a defect never reached the aligner, whose reasons cover the others.
        defects = [row.defect for row in conversations if row.defect is not None]
        return cls(Tally.of([*defects, *aligner.reasons], aligner.num_cut), aligner.cai)

    @property
    def epoch(self) -> int:
        """Iterations of an epoch over the usable rows."""
        return -(-self.tally.num_usable // self.cai.batch_size)

    @property
    def full_epoch(self) -> int:
        """Iterations of an epoch if every row were usable."""
        return -(-self.tally.num_rows // self.cai.batch_size)

    def words(self) -> list[str]:
        """Return the counts in one line, and a warning where many rows are dropped."""
        named = limits(self.cai)
        line = f"{self.tally.words('CAI rows', **named)}; an epoch has {self.epoch:,} iteration(s)"
        if self.epoch != self.full_epoch:
            line += f" instead of {self.full_epoch:,}"
        lines = [line]
        if self.tally.dropped_share > WARN_ABOVE:
            share = f"{100 * self.tally.dropped_share:.0f} % of the CAI rows are dropped"
            fix = self.tally.fix(**named) or "the model itself leaves nothing to learn in them"
            lines.append(f"warning: {share}, and CAI goes over the others more often; {fix}")
        return lines

    @writes(
        Metric("cai/num_usable", "conversations that CAI trains on", "rows"),
        Metric("cai/num_cut_rows", "usable rows cut to cai.max_length", "rows"),
        *drop_metrics("cai/", TOKEN_DROPS),
        Metric("cai/num_epoch_iterations", "iterations of an epoch over the usable rows", "iterations"),
        Metric("cai/num_epoch_iterations_of_all_rows", "the same if every row were usable", "iterations"),
    )
    def metrics(self) -> dict[str, int]:
        """Return ``cai/…`` counts of rows that their tokens decide, and iterations of an epoch."""
        return {
            "cai/num_usable": self.tally.num_usable,
            "cai/num_cut_rows": self.tally.num_cut,
            **self.tally.metrics("cai/", TOKEN_DROPS),
            "cai/num_epoch_iterations": self.epoch,
            "cai/num_epoch_iterations_of_all_rows": self.full_epoch,
        }
