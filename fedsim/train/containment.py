"""Work of one member of a lane between the lane's sums, with a failing client's errors contained.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from fedsim.base import user_code
from fedsim.base.errors import ClientError, FedsimError, NotFiniteError
from fedsim.federation.failures import NOT_FINITE, RAISED

T = TypeVar("T")

MACHINE: Final = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of the machine and not of a client: another number of processes, or another day, would not
have them.
"""


class OwnWork:
    """Computes; an error goes to the caller at once, as in any other code."""

    def do(self, compute: Callable[[], T]) -> T | None:
        """``compute()``; None if it is not computed."""
        return compute()

    def check(self) -> None:
        """Raise the error that was kept, if there is one."""


class ContainedWork(OwnWork):
    """Keeps the first error, after which it computes nothing more; one of :data:`MACHINE` leaves at
    once.

    The member still joins every sum of the lane, with NaN terms, so that the other members neither
    wait for it nor take what they compute for a result. Only text of the error is kept: its frames
    hold activations.
    """

    def __init__(self) -> None:
        self.error: ClientError | None = None

    def do(self, compute: Callable[[], T]) -> T | None:
        """``compute()``; None once something has failed."""
        if self.error is None:
            try:
                return compute()
            except Exception as error:
                if isinstance(error, MACHINE) or "can't allocate memory" in str(
                    error,
                ):  # torch's words on the CPU
                    raise
                self.error = client_error(error)
        return None

    def check(self) -> None:
        """Raise the error that was kept, if there is one.

        Raises:
            ClientError: something has failed.
        """
        if self.error is not None:
            raise self.error


def client_error(error: Exception) -> ClientError:
    """An error of a client's training with its reason; it holds no frames."""
    if isinstance(error, ClientError):
        return ClientError(error.reason, error.message, error.trace)
    text = " ".join(str(error).split())[:500]
    if isinstance(error, FedsimError):
        return ClientError(NOT_FINITE if isinstance(error, NotFiniteError) else RAISED, text)
    if user_code.place_of(error):
        return ClientError(RAISED, user_code.in_words(error))
    trace = "".join(traceback.format_exception(error))
    return ClientError(RAISED, f"{type(error).__name__}: {text}", trace)
