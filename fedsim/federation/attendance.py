"""Attendance of a round's cohort: clients without rows, simulated drop-outs and stragglers, steps of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.base import keyed_random
from fedsim.config import FailuresConfig


@dataclass(frozen=True)
class Attendance:
    """What a round's drawn clients do; nobody is in two of these.

    Attributes:
        steps: who trains, ascending → optimizer steps.
        sat_out: they have no rows to train on.
        dropped_out: they do not report in this round.
        stragglers: they manage fewer steps than they should → how many; under ``stragglers=partial`` they are in
            ``steps`` too, under ``drop`` they deliver nothing and nothing is computed for them.
    """

    steps: Mapping[int, int]
    sat_out: Sequence[int]
    dropped_out: Sequence[int]
    stragglers: Mapping[int, int]


def attend(
    drawn: Sequence[int], able: Sequence[int], num_steps: int, round_idx: int, seed: int, settings: FailuresConfig
) -> Attendance:
    """Attendance of a round.

    Every client and round has draws of its own, so that they depend on nobody else, and a client that drops out at one
    rate does so at every higher one.

    Args:
        drawn: the round's cohort.
        able: those of them that have rows.
        num_steps: steps of a client that is no straggler.
    """
    reporting = [c for c in able if not bernoulli(settings.dropout_rate, seed, "drop out", round_idx, c)]
    stragglers = {
        client: straggler_steps(num_steps, round_idx, client, seed)
        for client in reporting
        if bernoulli(settings.straggler_rate, seed, "straggle", round_idx, client)
    }
    steps = {client: stragglers.get(client, num_steps) for client in reporting}
    if settings.stragglers == "drop":
        steps = {client: steps[client] for client in steps if client not in stragglers}
    gone = [client for client in able if client not in reporting]
    return Attendance(steps, [client for client in drawn if client not in able], gone, stragglers)


def bernoulli(rate: float, seed: int, what: str, round_idx: int, client: int) -> bool:
    """Return whether an event of probability ``rate`` befalls a client in a round."""
    return rate > 0 and float(keyed_random.generator(seed, what, round_idx, client).random()) < rate


def straggler_steps(num_steps: int, round_idx: int, client: int, seed: int) -> int:
    """How far a straggler gets: uniform on 1 … ``num_steps`` − 1.

    Li et al. (2020, arXiv 1812.06127, section 5.2) draw a straggler's epochs so; here the unit is the optimizer step.
    """
    return int(keyed_random.generator(seed, "straggler steps", round_idx, client).integers(1, num_steps))
