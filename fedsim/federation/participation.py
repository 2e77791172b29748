"""Participants of a round and their rows: a drawn cohort, a single client, or all rows in one place.

The budget of a round is counted in optimizer steps of ``local.batch_size`` rows:

    a cohort      clients_per_round clients, local.steps each, their mean is the next adapter
    local         one client, local.steps: what the client could do on its own with its share of the federation's work
    centralised   one trainer with everybody's rows, local.steps x clients_per_round: as many rows as a cohort sees

Learning rate, batch size and the new optimizer in every round are the same in all three, so that a difference between
them is the federation's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fedsim.base.errors import DataError
from fedsim.federation.sampling import sample_cohort

Row = TypeVar("Row")


class Participation(Protocol):
    """Who takes part."""

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of everyone who may train, from the clients' kept rows.

        Raises:
            DataError: nobody could ever train.
        """
        ...

    def num_steps(self, local_steps: int) -> int:
        """Optimizer steps of each participant in a round."""
        ...

    def drawn(self, round_idx: int) -> list[int]:
        """Positions in :meth:`shards` of those who are to train in a round, ascending."""
        ...

    def words(self) -> str:
        """Who takes part, for people."""
        ...


@dataclass(frozen=True)
class SampledCohort:
    """A cohort drawn anew in every round, without replacement."""

    num_clients: int
    clients_per_round: int
    seed: int

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Each client holds its own rows; one without rows sits out when it is drawn."""
        if not any(shards):
            raise DataError("no client has rows left to train on after the filter; weaken or drop the guard")
        return [list(shard) for shard in shards]

    def num_steps(self, local_steps: int) -> int:
        """``local_steps``."""
        return local_steps

    def drawn(self, round_idx: int) -> list[int]:
        """The round's cohort."""
        return sample_cohort(self.num_clients, self.clients_per_round, round_idx, self.seed)

    def words(self) -> str:
        """Such as ``5 of 20 a round``."""
        return f"{self.clients_per_round} of {self.num_clients} a round"


@dataclass(frozen=True)
class OneClient:
    """The same client in every round."""

    client: int

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Each client holds its own rows; this one must have some."""
        if not shards[self.client]:
            others = [client for client, shard in enumerate(shards) if shard]
            raise DataError(
                f"federation.local_client={self.client}: this client has no rows to train on (federation.partition "
                "gave it none, or the filter took them); "
                + (f"give one that has: {_some(others)}" if others else "no client has, so weaken or drop the guard")
            )
        return [list(shard) for shard in shards]

    def num_steps(self, local_steps: int) -> int:
        """``local_steps``."""
        return local_steps

    def drawn(self, round_idx: int) -> list[int]:
        """The client."""
        return [self.client]

    def words(self) -> str:
        """Such as ``client 3 alone``."""
        return f"client {self.client} alone"


@dataclass(frozen=True)
class Pooled:
    """One trainer, number 0, that holds the rows of all clients and takes as many steps as a cohort would."""

    num_clients: int
    clients_per_round: int

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """All rows together, in the clients' order."""
        pool = [row for shard in shards for row in shard]
        if not pool:
            raise DataError(
                "federation.algorithm=centralised: no client has rows left to train on after the filter; weaken or "
                "drop the guard"
            )
        return [pool]

    def num_steps(self, local_steps: int) -> int:
        """The steps of a whole cohort."""
        return local_steps * self.clients_per_round

    def drawn(self, round_idx: int) -> list[int]:
        """The one trainer."""
        return [0]

    def words(self) -> str:
        """Such as ``the rows of 20 in one place``."""
        return f"the rows of {self.num_clients} in one place"


def _some(clients: Sequence[int], most: int = 10) -> str:
    return ", ".join(map(str, clients[:most])) + (", …" if len(clients) > most else "")
