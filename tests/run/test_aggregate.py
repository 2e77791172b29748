"""The round's one reduction: weighted deltas, uniform control deltas, every client's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsim.federation.algorithms import ClientOutcome
from fedsim.parallel.sums import Summer
from fedsim.run.aggregate import aggregate

SIZE = 7


def outcome(client: int, num_rows: int, control: bool = True, weight: float | None = None) -> ClientOutcome:
    g = torch.Generator().manual_seed(client)
    delta, c, d = torch.randn(3, SIZE, generator=g)
    counts = float(num_rows) if weight is None else weight
    return ClientOutcome(
        client, num_rows, counts, delta, c if control else None, d if control else None,
        loss=0.5 * client, first_loss=1.0 + client, num_tokens=100 * client + 7, seconds=2.0 + client,
    )  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("control", [True, False])
def test_sums_and_reports(exact: bool, control: bool) -> None:
    outcomes = [outcome(9, 30, control), outcome(2, 11, control), outcome(5, 0, control)]
    cohort = [2, 5, 9]
    got = aggregate(
        outcomes, outcomes, cohort, size=SIZE, has_control=control, num_clients=20, summer=Summer(None, exact=exact),
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    tolerance = {"rtol": 0, "atol": 1e-13 if exact else 1e-4}
    want = sum(o.num_rows * o.delta.double() for o in outcomes)
    torch.testing.assert_close(got.sums.weighted_delta.double(), want, **tolerance)
    assert got.sums.weight == 41 and got.sums.num_clients == 20
    if control:
        assert got.sums.control_delta is not None
        want = sum(o.control_delta.double() for o in outcomes if o.control_delta is not None)
        torch.testing.assert_close(got.sums.control_delta.double(), want, **tolerance)
    else:
        assert got.sums.control_delta is None
    assert [(c.client, c.num_rows, c.loss, c.first_loss, c.num_tokens) for c in got.clients] == [
        (2, 11, 1.0, 3.0, 207), (5, 0, 2.5, 6.0, 507), (9, 30, 4.5, 10.0, 907),
    ]  # fmt: skip
    assert got.busy_s == [22.0] and got.busy_tokens == [1621.0]


def test_deltas_are_weighted_by_the_outcomes_weight_not_its_rows() -> None:
    outcomes = [outcome(0, 30, weight=2.5), outcome(1, 9, weight=8.75), outcome(2, 4, weight=0.125)]
    got = aggregate(
        outcomes, outcomes, [0, 1, 2], size=SIZE, has_control=True, num_clients=3, summer=Summer(None, exact=True),
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    want = sum(o.weight * o.delta.double() for o in outcomes)
    torch.testing.assert_close(got.sums.weighted_delta, want, rtol=0, atol=1e-13)
    assert got.sums.weight == 11.375
    assert [(c.num_rows, c.weight) for c in got.clients] == [(30, 2.5), (9, 8.75), (4, 0.125)]


def test_a_member_counts_its_time_but_reports_only_its_own_clients() -> None:
    led, helped = outcome(3, 8), outcome(4, 9)
    got = aggregate(
        [led, helped], [led], [3, 4], size=SIZE, has_control=True, num_clients=5, summer=Summer(None, exact=True),
        rank=1, world_size=3, device=torch.device("cpu"),
    )  # fmt: skip
    torch.testing.assert_close(got.sums.weighted_delta, 8 * led.delta.double(), rtol=0, atol=1e-13)
    assert got.clients[0].num_rows == 8 and got.clients[1].num_rows == 0
    assert got.busy_s == [0.0, 11.0, 0.0]


def test_exact_sums_do_not_depend_on_the_order_of_clients() -> None:
    outcomes = [outcome(i, 10 + i) for i in range(5)]
    results = [
        aggregate(
            order, order, range(5), size=SIZE, has_control=True, num_clients=9, summer=Summer(None, exact=True),
            rank=0, world_size=1, device=torch.device("cpu"),
        )
        for order in (outcomes, outcomes[::-1], outcomes[2:] + outcomes[:2])
    ]  # fmt: skip
    for other in results[1:]:
        assert torch.equal(other.sums.weighted_delta, results[0].sums.weighted_delta)
        assert torch.equal(other.sums.control_delta, results[0].sums.control_delta)
        assert other.clients == results[0].clients


@pytest.mark.parametrize("num_clients", [3, 4, 5, 17])
def test_like_updates_do_not_overflow_the_integers_that_they_are_added_in(num_clients: int) -> None:
    """Each alone nearly fills the integers' range: room must be left for the whole cohort's sum."""
    near_two = 2 - 2**-20
    outcomes = [
        replace(outcome(client, 1), delta=torch.full((SIZE,), near_two), control_delta=torch.full((SIZE,), -near_two))
        for client in range(num_clients)
    ]
    got = aggregate(
        outcomes, outcomes, range(num_clients), size=SIZE, has_control=True, num_clients=num_clients,
        summer=Summer(None, exact=True), rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    assert got.sums.weighted_delta.tolist() == [num_clients * near_two] * SIZE
    assert got.sums.control_delta is not None
    assert got.sums.control_delta.tolist() == [-num_clients * near_two] * SIZE
