"""Failed clients: the reason, the rank, and the run's policy for a round without them."""

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
"""Reasons of a failure: training raised an error, became NaN or infinite, or moved further than
allowed. If the members of a lane give several reasons, the first in this order counts."""


@dataclass(frozen=True)
class ClientFailure:
    """A client that is left out of a round, as one rank saw it.

    Attributes:
        client: its id.
        reason: one of :data:`REASONS`.
        rank: that saw it.
        message: of the error, on one line.
        trace: traceback of an error that is not fedsim's own.
        seconds: wall-clock time that this rank spent on the client, s.
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
        """Rank, stage, round and client, as errors carry them."""
        return {
            "rank": self.rank,
            "stage": "local training",
            "round": round_number(round_idx),
            "client": self.client,
        }


def checked(outcome: ClientOutcome, max_norm: float) -> ClientOutcome:
    """Check that an outcome may be added to the round's sums, and return it.

    Args:
        max_norm: bound on the L2 norm of the delta, formed in fp64; 0 sets none.

    Raises:
        NotFiniteError: a number that the client reports is NaN or infinite.
        ClientError: the update is too long.
    """
    # Every vector that reaches the server, fp32 [size].
    for vector in (outcome.delta, outcome.control, outcome.control_delta):
        if vector is not None and not all_finite(vector):
            fault = "its update or control variate became NaN or infinite"
            raise NotFiniteError(f"client {outcome.client}: {fault}")
    if max_norm > 0:  # a bound is set
        norm = float(torch.linalg.vector_norm(outcome.delta, dtype=torch.float64))
        if norm > max_norm:
            raise ClientError(
                NORM,
                f"its update has norm {norm:.6g}, more than failures.max_update_norm={max_norm:g}; "
                "lower local.lr, or raise the bound",
            )
    return outcome


def by_client(found: Iterable[ClientFailure]) -> list[ClientFailure]:
    """One failure of each client, ascending: that of the first reason and the lowest rank."""
    first: dict[int, ClientFailure] = {}
    for failure in sorted(found, key=lambda f: (f.client, REASONS.index(f.reason), f.rank)):
        first.setdefault(failure.client, failure)
    return list(first.values())


def check_round(
    failures: Sequence[ClientFailure], num_delivered: int, round_idx: int, settings: FailuresConfig
) -> None:
    """Check that the run may go on after a round's local training.

    Raises:
        RunError: a client failed and the policy is to stop, or too few clients delivered an
            update. It carries the place of the first failure.
    """
    if not failures:  # the policy concerns failures only; drop-outs are simulated
        return

    # The cause: the first failure, and the number of others.
    first = failures[0]
    others = ""
    if len(failures) > 1:
        others = f" ({len(failures) - 1} more client(s) failed)"
    cause = f"client {first.client} failed ({first.reason}): {first.message}{others}"

    # The policy.
    if settings.on_client_error == "stop":
        fix = "set failures.on_client_error=skip to go on without a client that fails"
    elif num_delivered < settings.min_clients:
        least = f"failures.min_clients={settings.min_clients}"
        fix = f"{num_delivered} client(s) delivered an update, fewer than {least}"
    else:
        return
    message = f"{cause}; {fix}"
    if first.trace:
        message += f"\n{first.trace}"
    error = RunError(message)
    error.place = first.place(round_idx)
    raise error
