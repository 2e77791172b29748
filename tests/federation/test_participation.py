"""Who trains: cohorts, one client alone, and all rows in one place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fedsim.base.errors import DataError
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import build_algorithm
from fedsim.federation.participation import Participation
from fedsim.federation.sampling import sample_cohort


@dataclass(frozen=True)
class Row:
    """A training row."""

    name: str


SHARDS = [[Row("a"), Row("b")], [], [], [Row("d"), Row("e"), Row("f")]]


def participation(name: str, **keys: int) -> Participation:
    federation = FederationConfig(algorithm=name, num_clients=4, clients_per_round=3, **keys)  # type: ignore[arg-type]
    return build_algorithm(federation, ServerOptimizerConfig()).participation(federation, seed=5)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "scaffold"])
def test_a_cohort_is_drawn_anew(name: str) -> None:
    who = participation(name)
    assert [who.drawn(r) for r in range(20)] == [sample_cohort(4, 3, r, 5) for r in range(20)]
    assert who.shards(SHARDS) == SHARDS and who.num_steps(25) == 25
    assert who.words() == "3 of 4 a round"


def test_local_is_one_client_in_every_round() -> None:
    who = participation("local", local_client=3)
    assert [who.drawn(r) for r in range(3)] == [[3]] * 3
    assert who.shards(SHARDS)[3] == SHARDS[3] and who.num_steps(25) == 25
    assert who.words() == "client 3 alone"


def test_centralised_has_all_rows_and_a_cohorts_steps() -> None:
    who = participation("centralised")
    assert [who.drawn(r) for r in range(3)] == [[0]] * 3
    (pool,) = who.shards(SHARDS)
    assert [row.name for row in pool] == list("abdef")
    assert who.num_steps(25) == 75, "as many rows as three clients see"
    assert who.words() == "the rows of 4 in one place"


@pytest.mark.parametrize("client", [1, 2])
def test_a_client_that_cannot_train_is_an_error_that_names_others(client: int) -> None:
    with pytest.raises(
        DataError, match=rf"federation\.local_client={client}: .*partition gave it none.*give one that has: 0, 3$"
    ):
        participation("local", local_client=client).shards(SHARDS)


def test_a_federation_without_any_row_is_an_error() -> None:
    with pytest.raises(DataError, match="no client has, so weaken or drop the guard"):
        participation("local").shards([[], [], [], []])
    with pytest.raises(DataError, match=r"federation\.algorithm=centralised: no client has rows left"):
        participation("centralised").shards([[], [], [], []])
