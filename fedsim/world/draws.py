"""Keyed draws of the world's files: every row has its own, so that no row depends on how many there are."""

from __future__ import annotations

import random

from fedsim.base.keyed_random import derive


def keyed_random(seed: int, purpose: str, *place: int) -> random.Random:
    """Draws that belong to a place of a file, such as ``(0, "square", 7)``."""
    return random.Random(derive(seed, f"world/{purpose}", *place))
