"""Error policies for a lane member's computations between the lane's sums."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from fedsim.base import user_code
from fedsim.base.errors import ClientError, FedsimError, NotFiniteError
from fedsim.federation.failures import NOT_FINITE, RAISED

T = TypeVar("T")

MACHINE_ERRORS: Final = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of the machine, not of a client: they depend on its load and the number of processes."""


class RaiseErrors:
    """Error policy: raise at once."""

    def run(self, compute: Callable[[], T]) -> T | None:
        """Return ``compute()``; None if it was not computed, which only a subclass does."""
        return compute()

    def check(self) -> None:
        """Raise the error that was kept; this policy keeps none."""


class ContainErrors(RaiseErrors):
    """Error policy: keep the first error and compute nothing more; raise :data:`MACHINE_ERRORS`.

    The member still joins every sum of the lane, with NaN terms, so that the other members neither
    wait for it nor take the sums for results. Only the error's text is kept: its frames hold
    activations.
    """

    def __init__(self) -> None:
        self.error: ClientError | None = None

    def run(self, compute: Callable[[], T]) -> T | None:
        """Return ``compute()``; None once an error has been kept."""
        if self.error is None:
            try:
                return compute()
            except Exception as error:
                # On the CPU torch reports exhausted memory only in its message.
                is_full = "can't allocate memory" in str(error)
                if is_full or isinstance(error, MACHINE_ERRORS):
                    raise
                self.error = client_error(error)
        return None

    def check(self) -> None:
        """Raise the error that was kept, if there is one.

        Raises:
            ClientError: a computation has failed.
        """
        if self.error is not None:
            raise self.error


def client_error(error: Exception) -> ClientError:
    """Return the error of a client's training with its reason, without frames."""
    if isinstance(error, ClientError):
        return ClientError(error.reason, error.message, error.trace)
    text = " ".join(str(error).split())[:500]  # on one line
    if isinstance(error, FedsimError):
        return ClientError(NOT_FINITE if isinstance(error, NotFiniteError) else RAISED, text)
    if user_code.place_of(error):  # in a user's rule or attack: name its file and line
        return ClientError(RAISED, user_code.in_words(error))
    # An error that fedsim does not know: keep the traceback's text.
    trace = "".join(traceback.format_exception(error))
    return ClientError(RAISED, f"{type(error).__name__}: {text}", trace)
