"""Attendance of a round's cohort: simulated drop-outs and stragglers, and steps of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.base import keyed_random
from fedsim.config import FailuresConfig


@dataclass(frozen=True)
class Attendance:
    """Parts that the drawn clients of a round take; disjoint but for ``stragglers``.

    Attributes:
        steps: client that trains → its optimizer steps; ascending.
        sat_out: clients without rows to train on.
        dropped_out: clients that do not report in this round.
        stragglers: client that takes fewer steps than the others → how many; under
            ``stragglers=partial`` it is in ``steps`` too, under ``drop`` it delivers nothing and
            nothing is computed for it.
    """

    steps: Mapping[int, int]
    sat_out: Sequence[int]
    dropped_out: Sequence[int]
    stragglers: Mapping[int, int]


def attend(
    drawn: Sequence[int],
    able: Sequence[int],
    num_steps: int,
    round_idx: int,
    seed: int,
    settings: FailuresConfig,
) -> Attendance:
    """Draw the attendance of a round.

    Draws are keyed by client and round, so that they are independent of other clients, and a client
    that drops out at one rate does so at every higher one.

    Args:
        drawn: the round's cohort.
        able: its clients that have rows.
        num_steps: optimizer steps of a client that is no straggler.
    """
    # The draws of each client: does it report, and if so, after how many steps?
    sat_out = [client for client in drawn if client not in able]
    dropped_out: list[int] = []
    steps: dict[int, int] = {}
    stragglers: dict[int, int] = {}
    for client in able:
        if bernoulli(settings.dropout_rate, seed, "drop out", round_idx, client):
            dropped_out.append(client)
            continue
        is_straggler = bernoulli(settings.straggler_rate, seed, "straggle", round_idx, client)
        if is_straggler:
            stragglers[client] = straggler_steps(num_steps, round_idx, client, seed)
        if settings.stragglers == "drop" and is_straggler:
            continue  # it delivers nothing
        steps[client] = stragglers.get(client, num_steps)
    return Attendance(steps, sat_out, dropped_out, stragglers)


def bernoulli(rate: float, seed: int, what: str, round_idx: int, client: int) -> bool:
    """Bernoulli draw with probability ``rate``, keyed by event, round and client."""
    if rate <= 0:
        return False
    rng = keyed_random.generator(seed, what, round_idx, client)
    return float(rng.random()) < rate


def straggler_steps(num_steps: int, round_idx: int, client: int, seed: int) -> int:
    """Optimizer steps of a straggler: uniform on 1 … ``num_steps`` − 1.

    Li et al. (2020, arXiv 1812.06127, section 5.2) draw a straggler's epochs in this way.
    """
    rng = keyed_random.generator(seed, "straggler steps", round_idx, client)
    return int(rng.integers(1, num_steps))
