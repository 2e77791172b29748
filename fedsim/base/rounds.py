"""The two counts of a round: an index from 0 in the code, a number from 1 in what people read.

The index keys random draws and learning rates. The number is in metrics.jsonl, checkpoints,
logs, file names, W&B and on the terminal; the pretrained model's is 0.
"""

from __future__ import annotations

from typing import Final

PRETRAINED: Final = -1
"""Index of what belongs to the untouched model, before the first round."""


def round_number(round_idx: int) -> int:
    """Number of a round from its index: 1 for the first round, 0 for :data:`PRETRAINED`."""
    return round_idx + 1


def round_index(number: int) -> int:
    """Index of a round from its number."""
    return number - 1
