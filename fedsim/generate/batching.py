"""Units of generation: rows that are decoded together, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FEWEST: Final = 4
"""Units of a call with at least as many batches: one for each of four ranks.

Each unit ends with a tail, in which its last long rows keep few slots busy; a rank with two units
has two tails.
"""

MORE: Final = ((16, 16), (8, 8))
"""(units, batches of each) that a long call is cut into, most units first.

Eight units keep eight ranks busy, and take four ranks at most a tenth longer than four units do:
beside eight batches a tail is short. Sixteen are for calls so long that four ranks hardly notice.
"""

LONGEST_ROWS: Final = 2
"""A unit of a long call has at least this many times the longest row's tokens per slot.

Otherwise it would last as long as its longest row, and more ranks would not help.
"""


def num_units(most_new: Sequence[int], batch_size: int) -> int:
    """Return the number of units: the batches where these are few, else 4, 8 or 16 by the work.

    It must not depend on the number of ranks: the rows of a batch decide the last bits of its
    logits.

    Args:
        most_new: most tokens that each row may generate, over all of its turns.
        batch_size: rows that are decoded together.
    """
    num_batches = -(-len(most_new) // batch_size)
    if num_batches <= FEWEST:
        return num_batches
    longest_rows = sum(most_new) / (batch_size * max(most_new))  # per slot
    for count, batches in MORE:
        if num_batches >= count * batches and longest_rows >= count * LONGEST_ROWS:
            return count
    return FEWEST


def generation_units(
    lengths: Sequence[int],
    most_new: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """Return the rows of each unit, in the order in which their decoding begins.

    Rows that may generate the most are begun first, so that few slots are idle at the end; of
    these the longest prompts, so that memory runs out at the beginning or not at all. The ordered
    rows are dealt in turn: all units have rows of every kind, take about as long, and differ in
    size by one row at most.

    Args:
        lengths: tokens of each row's prompt.
        most_new: most tokens that each row may generate, over all of its turns.
        batch_size: rows that are decoded together.
    """
    # Most new tokens first, then the longest prompts; ties by index.
    order = sorted(range(len(lengths)), key=lambda i: (-most_new[i], -lengths[i], i))
    count = num_units(most_new, batch_size)
    return [order[unit::count] for unit in range(count)]
