"""Clients that fail, as data: why, on which rank, and what the run's policy makes of a round without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedsim.base.errors import ClientError, NotFiniteError, RunError
from fedsim.base.rounds import round_number
from fedsim.config import FailuresConfig
from fedsim.federation.algorithms import ClientOutcome
from fedsim.federation.elementwise import all_finite

RAISED, NOT_FINITE, NORM = "raised", "not finite", "norm"

REASONS = (RAISED, NOT_FINITE, NORM)
"""Why a client fails: its training raised an error, became NaN or infinite, or moved further than allowed. Where the
members of a lane give several reasons, the first in this order counts."""


@dataclass(frozen=True)
class ClientFailure:
    """A client that is left out of a round, as one rank saw it.

    Attributes:
        client: its id.
        reason: one of :data:`REASONS`.
        rank: that saw it.
        message: what happened, on one line.
        trace: traceback of an error that is not fedsim's own.
        seconds: wall-clock time that this rank spent on the client.
    """

    client: int
    reason: str
    rank: int
    message: str
    trace: str = ""
    seconds: float = 0.0

    def words(self) -> str:
        """``client 3 failed (not finite) on rank 1: …``."""
        return f"client {self.client} failed ({self.reason}) on rank {self.rank}: {self.message}"

    def place(self, round_idx: int) -> dict[str, int | str]:
        """Where it happened, as errors have it."""
        return {"rank": self.rank, "stage": "local training", "round": round_number(round_idx), "client": self.client}


def checked(outcome: ClientOutcome, max_norm: float) -> ClientOutcome:
    """The outcome, if it may be added to the round's sums.

    Args:
        max_norm: bound on the L2 norm of the delta, formed in fp64; 0 sets none.

    Raises:
        NotFiniteError: a number that the client reports is NaN or infinite.
        ClientError: the update is too long.
    """
    for vector in (outcome.delta, outcome.control, outcome.control_delta):
        if vector is not None and not all_finite(vector):
            raise NotFiniteError(f"client {outcome.client}: its update or control variate became NaN or infinite")
    if max_norm > 0:
        norm = float(torch.linalg.vector_norm(outcome.delta, dtype=torch.float64))
        if norm > max_norm:
            raise ClientError(
                NORM, f"its update has norm {norm:.6g}, more than failures.max_update_norm={max_norm:g}; lower "
                "local.lr, or raise the bound"
            )  # fmt: skip
    return outcome


def by_client(found: Iterable[ClientFailure]) -> list[ClientFailure]:
    """One failure of each client, ascending: the foremost reason's, of the lowest rank that gave it."""
    ranked = sorted(found, key=lambda f: (f.client, REASONS.index(f.reason), f.rank))
    first = {failure.client: failure for failure in reversed(ranked)}
    return [first[client] for client in sorted(first)]


def check_round(
    failures: Sequence[ClientFailure], num_delivered: int, round_idx: int, settings: FailuresConfig
) -> None:
    """Check that the run may go on after a round's local training.

    Raises:
        RunError: a client failed and the policy is to stop, or too few clients delivered an update. It has the
            place.
    """
    if not failures:
        return
    first = failures[0]
    others = f" ({len(failures) - 1} more client(s) failed)" if len(failures) > 1 else ""
    cause = f"client {first.client} failed ({first.reason}): {first.message}{others}"
    if settings.on_client_error == "stop":
        fix = "set failures.on_client_error=skip to go on without a client that fails"
    elif num_delivered < settings.min_clients:
        fix = f"{num_delivered} client(s) delivered an update, fewer than failures.min_clients={settings.min_clients}"
    else:
        return
    error = RunError(f"{cause}; {fix}" + (f"\n{first.trace}" if first.trace else ""))
    error.place = first.place(round_idx)
    raise error
