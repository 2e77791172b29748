"""Units of generation: which rows are decoded together, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FEWEST: Final = 4
"""Units of a call that has more batches: one for each of four ranks. Each unit more has a tail of idle slots more."""

MOST_UNITS: Final = 16
"""Most units of a call; of more ranks than units the rest has nothing to do."""

BATCHES_A_UNIT: Final = 16
"""There are more units than :data:`FEWEST` where each has so many batches, beside which its tail is short."""


def num_units(num_rows: int, batch_size: int) -> int:
    """How many units rows are cut into: no more than batches, and a multiple of :data:`FEWEST` beyond it.

    It must not depend on the number of ranks, which would change who shares a batch with whom.
    """
    num_batches = -(-num_rows // batch_size)
    if num_batches <= FEWEST:
        return num_batches
    return min(max(num_batches // BATCHES_A_UNIT // FEWEST, 1) * FEWEST, MOST_UNITS)


def generation_units(lengths: Sequence[int], most_new: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of each unit, in the order in which they are begun.

    Rows that may generate the most are begun first, so that none of them runs alone at the end; of these the longest
    prompts, so that memory runs out at the beginning or not at all. The ordered rows are dealt in turn: all units
    have rows of every kind, take about as long, and differ in size by one row at most.

    Args:
        lengths: tokens of each row's prompt.
        most_new: most tokens that each row may generate, over all of its turns.
        batch_size: rows that are decoded together.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-most_new[i], -lengths[i], i))
    count = num_units(len(order), batch_size)
    return [order[unit::count] for unit in range(count)]
