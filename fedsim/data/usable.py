"""Rows that can be trained on: one rule for all stages, and counts of the rows that break it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedsim.base.errors import ConfigError
from fedsim.base.metric import Metric

if TYPE_CHECKING:
    from fedsim.data.chat import ChatFormat, TokenRow

REASONS: Final[Mapping[str, str]] = {
    "no_targets": "whose prompt fills {max_length}",
    "empty_reply": "with an empty reply",
    "no_weight": "of weight 0",
    "empty_response": "with an empty response",
    "empty_revision": "with an empty revision",
    "unchanged": "with an unchanged revision",
    "truncated": "cut off (by {max_new_tokens} or the model's context)",
    "same_replies": "whose two replies have the same tokens",
}
"""Reasons to drop a row in words, by the name that the count has in the metrics. CAI's
conversations are dropped for one of the last five (:attr:`fedsim.safety.cai_data.CaiRow.defect`),
or because a reply is unusable."""

LIMITS: Final = {"max_length": "the longest length", "max_new_tokens": "the longest turn"}
"""Limits in :data:`REASONS`, where none is meant in particular."""


def drop_metrics(prefix: str, reasons: Iterable[str]) -> tuple[Metric, ...]:
    """Metrics that :meth:`Tally.metrics` writes."""
    return tuple(
        Metric(f"{prefix}num_dropped_{reason}", f"rows dropped: {REASONS[reason].format(**LIMITS)}", "rows")
        for reason in reasons
    )


FIXES: Final[Mapping[str, str]] = {
    "no_targets": "raise {max_length}",
    "empty_reply": "give rows that have replies",
    "no_weight": "raise guard.red_weight",
    "truncated": "raise {max_new_tokens}",
}
"""Fixes by reason, where a setting or the data can help; other reasons are the model's."""


def has_reply(reply: str) -> bool:
    """True if a reply holds more than white space."""
    return bool(reply.strip())


def why_unusable(chat: ChatFormat, row: TokenRow, reply: str) -> str | None:
    """Name the reason of :data:`REASONS` why a row is unusable; None for a usable row.

    A usable row has a positive weight, a reply that is not blank, and a target that is part of the
    reply: a row that only teaches the end of a turn has none.

    Args:
        row: the tokens, cut to the longest length.
        reply: the text of the reply, before it was cut.
    """
    if row.weight <= 0:
        return "no_weight"
    if not has_reply(reply):
        return "empty_reply"
    # A row's first token is never a target. Where no target is text, either no more of the reply
    # fits, or the tokenizer keeps nothing of it.
    if not chat.decode(row.input_ids[1:][row.loss_mask[1:]]):
        if row.truncated:
            return "no_targets"
        return "empty_reply"
    return None


@dataclass(frozen=True)
class Tally:
    """Counts of the rows of a stage.

    Attributes:
        num_rows: rows before any is dropped.
        dropped: dropped rows by reason, a key of :data:`REASONS`; each row has one reason.
        num_cut: usable rows that lost the end of their reply.
    """

    num_rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    num_cut: int = 0

    @classmethod
    def of(cls, reasons: Iterable[str | None], num_cut: int = 0) -> Tally:
        """Count rows by the reason that each is dropped for; None means a usable row."""
        counts = Counter(reasons)
        dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
        known = sum(dropped.values()) + counts[None]
        assert known == counts.total(), f"an unknown reason: {counts}"
        return cls(counts.total(), dropped, num_cut)

    @property
    def num_dropped(self) -> int:
        """Dropped rows."""
        return sum(self.dropped.values())

    @property
    def num_usable(self) -> int:
        """Rows that are left."""
        return self.num_rows - self.num_dropped

    @property
    def dropped_share(self) -> float:
        """Dropped rows as a share of all, 0 to 1."""
        if not self.num_rows:
            return 0.0
        return self.num_dropped / self.num_rows

    def reasons(self, **limits: str) -> str:
        """Numbers and reasons, such as ``2 with an empty reply``, the most frequent first.

        Args:
            limits: the texts of ``max_length`` and ``max_new_tokens``.
        """
        listed = []
        for reason in self._ranked():
            listed.append(f"{self.dropped[reason]:,} {REASONS[reason].format(**limits)}")
        return ", ".join(listed)

    def words(self, what: str, **limits: str) -> str:
        """``local rows: 37 of 6,000 dropped, 0.6 % (35 whose …); 120 replies cut to fit``."""
        text = f"{what}: {self.num_dropped:,} of {self.num_rows:,} dropped"
        if self.num_dropped:
            text += f", {100 * self.dropped_share:.2g} % ({self.reasons(**limits)})"
        if self.num_cut:
            text += f"; {self.num_cut:,} replies cut to fit"
        return text

    def fix(self, **limits: str) -> str:
        """Fixes such as ``raise local.max_length``, most rows first; "" where no setting helps."""
        keys = {name: limit.partition("=")[0] for name, limit in limits.items()}
        found = [FIXES[reason] for reason in self._ranked() if reason in FIXES]
        return ", ".join(fix.format(**keys) for fix in found)

    def none_left(self, what: str, **limits: str) -> ConfigError:
        """Error of a stage whose rows are all dropped."""
        fix = self.fix(**limits) or "use other rows or another model, or switch the stage off"
        reasons = self.reasons(**limits)
        rule = f"none of the {self.num_rows:,} can be trained on ({reasons})"
        return ConfigError(f"{what}: {rule}; {fix}")

    def _ranked(self) -> list[str]:
        """The reasons, the most frequent first."""
        return sorted(self.dropped, key=lambda reason: -self.dropped[reason])

    def metrics(self, prefix: str, reasons: Iterable[str]) -> dict[str, int]:
        """Rows dropped for each of ``reasons`` as ``<prefix>num_dropped_<reason>``, 0 included."""
        return {f"{prefix}num_dropped_{reason}": self.dropped.get(reason, 0) for reason in reasons}
