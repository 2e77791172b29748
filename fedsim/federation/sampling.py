"""Sampling of a round's cohort, and of the rows that a client trains on."""

from __future__ import annotations

import math

from fedsim.base import keyed_random


def sample_cohort(num_clients: int, clients_per_round: int, round_idx: int, seed: int) -> list[int]:
    """Clients of a round, drawn without replacement, in ascending order."""
    drawn = keyed_random.permutation(num_clients, seed, "cohort", round_idx)[:clients_per_round]
    return sorted(int(c) for c in drawn)


def sample_rows(num_rows: int, num_wanted: int, round_idx: int, client: int, seed: int) -> list[int]:
    """Positions of the rows a client trains on in a round, in order.

    Rows come from one random order after another, so none repeats before all were used; every client and round has its
    own orders.
    """
    assert num_rows > 0, "a client without rows does not train"
    drawn: list[int] = []
    for epoch in range(math.ceil(num_wanted / num_rows)):
        drawn.extend(int(i) for i in keyed_random.permutation(num_rows, seed, "rows", round_idx, client, epoch))
    return drawn[:num_wanted]


def cosine_by_round(round_idx: int, num_rounds: int, lr: float, lr_min: float) -> float:
    """Learning rate of a round, constant within it: cosine from ``lr`` towards ``lr_min`` (OpenFedLLM)."""
    return lr_min + 0.5 * (lr - lr_min) * (1.0 + math.cos(math.pi * round_idx / num_rounds))
