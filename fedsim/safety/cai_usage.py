"""How many of CAI's conversations can be trained on, and how long an epoch over them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.config import CaiConfig
from fedsim.data.usable import Tally
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import CaiRow

WARN_ABOVE = 0.1
"""Share of dropped conversations above which a run warns."""


@dataclass(frozen=True)
class CaiUsage:
    """What became of the conversations that were asked for.

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
        """The counts in one line, and a warning where many rows are dropped."""
        limits = {
            "max_length": f"cai.max_length={self.cai.max_length}",
            "max_new_tokens": f"cai.max_new_tokens={self.cai.max_new_tokens}",
        }
        line = f"{self.tally.words('CAI rows', **limits)}; an epoch has {self.epoch:,} iteration(s)"
        lines = [line if self.epoch == self.full_epoch else f"{line} instead of {self.full_epoch:,}"]
        if self.tally.dropped_share > WARN_ABOVE:
            fix = self.tally.fix(**limits) or "the model itself leaves nothing to learn in them"
            lines.append(
                f"warning: {100 * self.tally.dropped_share:.0f} % of the CAI rows are dropped, and CAI goes over "
                f"the others more often; {fix}"
            )
        return lines

    def metrics(self) -> dict[str, int]:
        """``cai/…`` counts that the tokens decide, beside those of the defects, and iterations of an epoch."""
        return {
            "cai/num_usable": self.tally.num_usable,
            "cai/num_cut_rows": self.tally.num_cut,
            **self.tally.metrics("cai/", ("no_targets", "empty_reply", "same_replies")),
            "cai/num_epoch_iterations": self.epoch,
            "cai/num_epoch_iterations_of_all_rows": self.full_epoch,
        }
