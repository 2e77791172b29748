"""Which rows are generated together: units of work that are the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

MOST_UNITS: Final = 16
"""Generation makes so many units at most, so that of many rows each unit has several batches, whose slots stay busy.

It must not depend on the number of ranks; of more ranks than units the rest has nothing to do.
"""


def generation_units(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of each unit, the longest prompts first, so that memory runs out at the beginning or not at all.

    The rows are cut into as few equal batches as there can be, and those into :data:`MOST_UNITS` units at most. No unit
    has a few rows more than slots, which would wait for a whole batch to end.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    num_batches = -(-len(order) // batch_size)
    num_units = min(num_batches, MOST_UNITS)
    batches = [num_batches * u // num_units for u in range(num_units + 1)] if num_units else []
    cuts = [len(order) * b // num_batches for b in batches]
    return [order[begin:end] for begin, end in pairwise(cuts)]
