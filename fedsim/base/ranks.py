"""Interface to the other processes: share fixed units of work, gather in order, sum, agree.

Stages (guard, CAI, evaluation) are handed a :class:`Ranks`, training a :class:`Lane`.
:class:`OneRank` is the identity; the versions over process groups are in ``fedsim.parallel``, the
only code that calls ``torch.distributed``. A stage's results may not depend on which rank computed
what, so the units are fixed by the caller and computed the same way wherever they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Ranks(Protocol):
    """Work sharing over all processes of the run."""

    @property
    def rank(self) -> int:
        """This process, 0 … size − 1."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that prints and writes records."""
        ...

    def map(
        self,
        compute: Callable[[T], R],
        units: Sequence[T],
        costs: Sequence[float] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[R]:
        """Compute ``[compute(u) for u in units]`` on all ranks; each gets the whole list in order.

        Args:
            compute: called once per unit on one rank; its result must pickle.
            costs: relative cost of each unit, used to balance ranks; equal costs if None.
            on_done: called with the number of units done on this rank, after each.

        Raises:
            FedsimError: the first error by rank order, the same on every rank.
        """
        ...

    def once(self, compute: Callable[[], R]) -> R:
        """Call ``compute()`` on rank 0 only; every rank gets its result, or its error."""
        ...

    def each(self, compute: Callable[[], R]) -> list[R]:
        """Call ``compute()`` on every rank; each gets all results, or the first error, by rank.

        Nothing inside ``compute`` may wait for another rank.
        """
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, known to all."""
        ...


@dataclass(frozen=True, eq=False)
class Term:
    """``weight · vector``, one contribution to a segment."""

    vector: torch.Tensor
    weight: float = 1.0


class Sums(Protocol):
    """Adds vectors over the members of a group."""

    exact: bool

    def sum(
        self,
        segments: Sequence[Sequence[Term]],
        sizes: Sequence[int],
        count: int,
    ) -> list[torch.Tensor]:
        """Sum each segment over the terms of all members; every member gets the same vectors.

        They are fp64 in exact mode, fp32 otherwise, and not to be changed in place: one may be a
        term's own vector.

        Args:
            segments: this member's terms of each segment; a member without terms gives empty lists.
            sizes: length of each segment, the same on every member.
            count: an upper bound of the terms of any one segment over all members, the same on
                every member.
        """
        ...


class Lane(Protocol):
    """The ranks that share a batch."""

    @property
    def index(self) -> int:
        """This member, 0 … size − 1."""
        ...

    @property
    def size(self) -> int:
        """Number of members."""
        ...

    @property
    def summer(self) -> Sums:
        """Adds over the members."""
        ...


class OneRank:
    """A single process: every operation is the identity."""

    rank = 0
    size = 1
    is_main = True

    def map(
        self,
        compute: Callable[[T], R],
        units: Sequence[T],
        costs: Sequence[float] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[R]:
        """Compute every unit in turn."""
        results: list[R] = []
        for unit in units:
            results.append(compute(unit))
            if on_done is not None:
                on_done(len(results))
        return results

    def once(self, compute: Callable[[], R]) -> R:
        """Compute here."""
        return compute()

    def each(self, compute: Callable[[], R]) -> list[R]:
        """Compute here."""
        return [compute()]

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]
