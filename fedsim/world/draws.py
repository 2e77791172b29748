"""Keyed draws of the world's files: one key per row, so that rows do not depend on their number."""

from __future__ import annotations

import random

from fedsim.base.keyed_random import derive


def keyed_random(seed: int, purpose: str, *place: int) -> random.Random:
    """Random numbers of a place in a file, such as ``(0, "square", 7)``."""
    return random.Random(derive(seed, f"world/{purpose}", *place))
