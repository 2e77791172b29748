"""CAI's conversations in words: harmful first responses, critiques, repairs and DPO's margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedsim.base.tables import NOT_MEASURED, measured, number, with_interval
from fedsim.record.metrics import Row

#: Shares of the conversations, in percent → their titles.
FINDINGS: Final = {
    "cai/harmful_response": "harmful first responses",
    "cai/critique_finds_harm": "critiques that find harm",
    "cai/repaired_revision": "harmful responses with a careful revision",
}

HARMFUL_RESPONSE, CRITIQUE_FINDS_HARM, REPAIRED_REVISION = FINDINGS

LAST_ROUND: Final = ("cai/reward_margin", "cai/reward_accuracy", "cai/dpo_loss")
"""Means over a round's DPO pairs.

In this order: margin in nats, share of pairs with a positive margin (0 to 1), loss in nats.
"""

MARGIN, ACCURACY, DPO_LOSS = LAST_ROUND

REPLAY_BELOW: Final = 5.0
"""Percent of harmful first responses below which CAI is replay of the writer's own replies."""

REPLAY_WORDS: Final = (
    "Hardly any first response is harmful, so that critique and revision change nothing and DPO "
    "has nothing to prefer: CAI here is replay, training on the writer's own first replies."
)

UNREPAIRED_WORDS: Final = (
    "Hardly any harmful first response has a careful revision: "
    "CAI here trains on what it is to repair."
)  # fmt: skip


def is_replay(harmful: float | None) -> bool:
    """Return True if hardly any first response is harmful; False where that was not measured.

    Args:
        harmful: share of harmful first responses, in percent.
    """
    return harmful is not None and harmful < REPLAY_BELOW


def cai_lines(rows: Sequence[Row]) -> list[str]:
    """One line of findings and the last round's DPO, one more where next to nothing is repaired.

    Returns:
        No lines without CAI.
    """
    data = [row for row in rows if row["stage"] == "cai_data"]
    rounds = [row for row in rows if row["stage"] == "round" and MARGIN in row]
    if not data:
        return []
    # The conversations.
    last = data[-1]
    shown = [f"{title} {_share(last, name)}" for name, title in FINDINGS.items()]
    line = f"CAI's conversations: {', '.join(shown)}"
    # Training on them.
    if rounds:
        margin, accuracy = measured(rounds[-1], MARGIN), measured(rounds[-1], ACCURACY)
        right = NOT_MEASURED if accuracy is None else f"{100 * accuracy:.1f} %"
        line += f"; DPO in its last round: margin {number(margin, 2)} nats, accuracy {right}"
    lines = [f"{line}."]
    # What CAI could and could not teach with them, in percent of the conversations.
    harmful, repaired = measured(last, HARMFUL_RESPONSE), measured(last, REPAIRED_REVISION)
    if is_replay(harmful):
        lines.append(REPLAY_WORDS)
    elif harmful is not None and repaired is not None and repaired < harmful * REPLAY_BELOW / 100:
        lines.append(UNREPAIRED_WORDS)
    return lines


def _share(row: Row, name: str) -> str:
    """Format a share with its interval and count: ``1.0 % [0.4, 2.5] of 400``."""
    text = with_interval(row, name, 1, " %")
    count = measured(row, f"{name}_count")
    if count is None:
        return text
    return f"{text} of {number(count)}"
