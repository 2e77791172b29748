"""Participants of a round and their rows: a cohort, a single client, or all rows in one place.

The budget of a round is counted in optimizer steps of ``local.batch_size`` rows:

    a cohort      clients_per_round clients, local.steps each; their mean is the next adapter
    local         one client, local.steps: a client's own share of the federation's work
    centralised   one trainer with the rows of all clients, local.steps x clients_per_round:
                  as many rows as a cohort sees

Learning rate, batch size and the new optimizer in every round are the same in all three, so that
only the federation makes a difference between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fedsim.base import keyed_random
from fedsim.base.errors import DataError

Row = TypeVar("Row")


class Participation(Protocol):
    """Rule for who trains in each round, on which rows."""

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Rows of each possible participant.

        Args:
            shards: each client's rows that the filter kept.

        Raises:
            DataError: no participant could ever train.
        """
        ...

    def num_steps(self, local_steps: int) -> int:
        """Optimizer steps of each participant in a round."""
        ...

    def drawn(self, round_idx: int) -> list[int]:
        """Positions in :meth:`shards` of the participants of a round, ascending."""
        ...

    def words(self) -> str:
        """Description for the printed plan."""
        ...


@dataclass(frozen=True)
class SampledCohort:
    """A new cohort in every round, drawn without replacement."""

    num_clients: int
    clients_per_round: int
    seed: int

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Each client's own rows; a client without rows sits out when it is drawn."""
        if not any(shards):
            raise DataError(
                "no client has rows left to train on after the filter; weaken or drop the guard",
            )
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
        """Each client's own rows; this one must have some."""
        if not shards[self.client]:
            # Name the clients that could take its place.
            others = [client for client, shard in enumerate(shards) if shard]
            fix = "no client has, so weaken or drop the guard"
            if others:
                fix = f"give one that has: {_listed(others)}"
            raise DataError(
                f"federation.local_client={self.client}: this client has no rows to train on "
                f"(federation.partition gave it none, or the filter took them); {fix}"
            )
        return [list(shard) for shard in shards]

    def num_steps(self, local_steps: int) -> int:
        """``local_steps``."""
        return local_steps

    def drawn(self, round_idx: int) -> list[int]:
        """The client."""
        return [self.client]

    def words(self) -> str:
        """Such as ``client 3 only``."""
        return f"client {self.client} only"


@dataclass(frozen=True)
class Pooled:
    """One trainer, number 0, with the rows of all clients and the optimizer steps of a cohort."""

    num_clients: int
    clients_per_round: int

    def shards(self, shards: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """All rows as one shard, in the clients' order."""
        pool: list[Row] = []
        for shard in shards:
            pool.extend(shard)
        if not pool:
            raise DataError(
                "federation.algorithm=centralised: no client has rows left to train on after the "
                "filter; weaken or drop the guard"
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


def sample_cohort(num_clients: int, clients_per_round: int, round_idx: int, seed: int) -> list[int]:
    """Draw the clients of a round without replacement; ascending."""
    # The first clients of a random order, so that a smaller cohort is part of a larger one.
    order = keyed_random.permutation(num_clients, seed, "cohort", round_idx)
    return sorted(int(client) for client in order[:clients_per_round])


def sample_rows(
    num_rows: int,
    num_wanted: int,
    round_idx: int,
    client: int,
    seed: int,
) -> list[int]:
    """Draw the positions of the rows that a client trains on in a round, in order.

    Rows come from one random order after another, so none repeats before all were used. The orders
    are keyed by client and round.
    """
    assert num_rows > 0, "a client without rows does not train"
    drawn: list[int] = []
    for epoch in range(math.ceil(num_wanted / num_rows)):
        order = keyed_random.permutation(num_rows, seed, "rows", round_idx, client, epoch)
        drawn.extend(int(position) for position in order)
    return drawn[:num_wanted]


def cosine_by_round(round_idx: int, num_rounds: int, lr: float, lr_min: float) -> float:
    """Learning rate of a round: cosine from ``lr`` towards ``lr_min`` (OpenFedLLM)."""
    return lr_min + 0.5 * (lr - lr_min) * (1.0 + math.cos(math.pi * round_idx / num_rounds))


def _listed(clients: Sequence[int], most: int = 10) -> str:
    """Clients separated by commas, the first ``most`` of them."""
    text = ", ".join(map(str, clients[:most]))
    if len(clients) > most:
        text += ", …"
    return text
