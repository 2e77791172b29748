"""Errors that a user can meet. Each message names the value, the rule and the fix.

All of them inherit :class:`FedsimError`; the ones that a user's input causes are also
``ValueError``. ``assert`` is kept for our own invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


class FedsimError(Exception):
    """Root of every error that fedsim raises on purpose."""

    place: Mapping[str, int | str] = {}
    """Place of its origin, as far as that is known: rank, stage, round (from 1), client."""

    @property
    def status(self) -> int:
        """Exit status of a process that it ends."""
        return 2


class ConfigError(FedsimError, ValueError):
    """A configuration key or value is wrong."""


class FolderError(ConfigError):
    """A folder cannot be made or written."""


class DataError(FedsimError, ValueError):
    """A data file is missing, malformed or too small for what was asked."""


class ModelError(FedsimError, ValueError):
    """A model directory, tokenizer or adapter cannot be used."""


class CheckpointError(FedsimError, ValueError):
    """A checkpoint or artefact is damaged, or belongs to another run."""


class DiskFullError(FedsimError, OSError):
    """There is no space left where a run writes."""


class JudgeError(FedsimError, RuntimeError):
    """The judge of MT-Bench answers cannot be reached or does not answer as it should."""


class RunError(FedsimError, RuntimeError):
    """The run cannot go on: ranks disagree, or another rank failed."""


class MemoryFullError(RunError):
    """A GPU, or the machine, has no memory left for what is to be computed."""


class Stopped(FedsimError):
    """The run ends early because it was asked to; all finished rounds are on disk.

    Args:
        message: after which round.
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def status(self) -> int:
        """128 + signal number (shell convention)."""
        return 128 + int(self.args[1])


class LostRankError(RunError):
    """Another rank has ended, is stopped, or does not answer; the message names it.

    ``place`` is where it was.
    """


class NotFiniteError(RunError):
    """Training gave a loss, gradient or update with a number that is NaN or infinite."""


class ClientError(RunError):
    """A client's part in a round failed; ``failures.on_client_error`` decides what follows.

    Args:
        reason: one of :data:`fedsim.federation.failures.REASONS`.
        message: what happened, on one line.
        trace: the traceback of an error that is not fedsim's own, as text.
    """

    def __init__(self, reason: str, message: str, trace: str = "") -> None:
        super().__init__(reason, message, trace)
        self.reason = reason
        self.message = message
        self.trace = trace

    def __str__(self) -> str:
        return self.message


class Problems(FedsimError):
    """Several mistakes in what a user gave, found at once.

    Args:
        errors: each with its own message; two or more.
    """

    def __init__(self, errors: tuple[FedsimError, ...]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


class Gathered:
    """Mistakes of independent checks, so that a user is shown all of them at once."""

    def __init__(self) -> None:
        self.errors: list[FedsimError] = []

    def attempt(self, check: Callable[[], T]) -> T | None:
        """Return the result of a check, or None if it found a mistake, which is kept.

        Any other error is raised at once.
        """
        try:
            return check()
        except (ConfigError, DataError, ModelError, JudgeError, Problems) as error:
            self.add(error)
            return None

    def add(self, error: FedsimError) -> None:
        """Keep a mistake, once."""
        # Two checks may find the same mistake.
        known = {str(kept) for kept in self.errors}
        new = error.errors if isinstance(error, Problems) else (error,)
        self.errors += [part for part in new if str(part) not in known]

    def raise_all(self) -> None:
        """Raise what was found: one mistake as it is, several as :class:`Problems`."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise Problems(tuple(self.errors))


def reason(error: Exception) -> str:
    """Return a library's error as one line of at most 300 characters.

    The class's name is added where the text says little: a bare key, or a single word.
    """
    text = " ".join(str(error).split())[:300]
    name = type(error).__name__
    if not text:
        return name
    if isinstance(error, LookupError) or len(text.split()) < 2:
        return f"{name}: {text}"
    return text
