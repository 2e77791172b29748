"""The reduction that ends a round: the same bits for any number of ranks and any dealing, and near the exact sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.federation.algorithms import ClientOutcome
from fedsim.parallel.world import process_world
from fedsim.run.aggregate import aggregate

SIZE = 400
NUM_CLIENTS = 9
HELD = [3, 70, 1, 1000, 12, 7]  # rows of each client: its weight


def vector(seed: int, client: int, name: str) -> torch.Tensor:
    """Numbers over 24 orders of magnitude, so that the grid of the sum matters."""
    rng = np.random.default_rng([seed, client, len(name)])
    values = rng.standard_normal(SIZE) * 10.0 ** rng.uniform(-20, 4, SIZE)
    return torch.from_numpy(values.astype(np.float32))


def outcome(seed: int, client: int, has_control: bool) -> ClientOutcome:
    """What a client reports; a pure function of the arguments, so any rank can make it."""
    control = vector(seed, client, "control") if has_control else None
    return ClientOutcome(
        client=client,
        num_rows=HELD[client],
        weight=float(HELD[client]),
        delta=vector(seed, client, "delta"),
        control=control,
        control_delta=control,
        loss=1.0 / (1 + client),
        first_loss=math.pi * (1 + client),
        num_tokens=100 + client,
        seconds=0.5 + client,
    )


def aggregate_dealt(seed: int, num: int, dealings: list[list[int]], has_control: bool, exact: bool) -> list[Any]:
    """Aggregate clients 0 … num − 1 once per dealing; dealing[i] % size is the rank that reports client i.

    The next rank also took part in training each client, as on a wide lane.
    """
    results = []
    with process_world(exact=exact, threads=1, timeout_s=60, device="cpu") as world:
        for dealing in dealings:
            owner = [place % world.size for place in dealing]
            helper = [(rank + 1) % world.size for rank in owner]
            mine = [outcome(seed, c, has_control) for c in range(num) if owner[c] == world.rank]
            helped = [outcome(seed, c, has_control) for c in range(num) if helper[c] == world.rank and world.size > 1]
            found = aggregate(
                [*mine, *helped],
                mine,
                list(range(num)),
                size=SIZE,
                has_control=has_control,
                num_clients=NUM_CLIENTS,
                summer=world.everyone().summer,
                rank=world.rank,
                world_size=world.size,
                device=world.device,
            )
            control = found.sums.control_delta
            sums = (found.sums.weighted_delta.numpy(), None if control is None else control.numpy())
            results.append((*sums, found.sums.weight, found.clients and [vars(c) for c in found.clients], found.busy_s))
    return results


DEALINGS = [[0, 1, 2, 3, 0, 1], [3, 3, 3, 3, 3, 3], [1, 0, 3, 2, 1, 0]]


def bits(values: np.ndarray | None) -> bytes | None:
    """The array's bytes."""
    return None if values is None else values.tobytes()


@pytest.mark.parametrize("num", [1, 2, 3, 6])  # fewer and more clients than ranks
@pytest.mark.parametrize("has_control", [False, True])
def test_bits_do_not_depend_on_ranks_or_dealing(pool: Any, num: int, has_control: bool) -> None:
    jobs = [(size, aggregate_dealt, 5, num, DEALINGS, has_control, True) for size in (1, 2, 3, 4)]
    found = [result for job in pool.run_all(jobs) for rank in job for result in rank]
    delta, control, weight, clients, _ = found[0]
    for result in found:
        assert bits(result[0]) == bits(delta)
        assert bits(result[1]) == bits(control)
        assert result[2] == weight == sum(HELD[:num])
        assert result[3] == clients
    assert [c["num_tokens"] for c in clients] == [100 + c for c in range(num)]
    # A figure keeps at least 50 of its 53 bits.
    assert [c["first_loss"] for c in clients] == pytest.approx([math.pi * (1 + c) for c in range(num)], rel=2.0**-50)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_sums_are_within_the_bound_of_the_exact_ones(pool: Any, size: int) -> None:
    num = 6
    ((delta, control, *_),) = pool.run(size, aggregate_dealt, 8, num, DEALINGS[:1], True, True)[0]
    for got, name, weights in ((delta, "delta", HELD), (control, "control", [1] * num)):
        terms = [vector(8, c, name).double().numpy() * weights[c] for c in range(num)]  # exact: 24 + 10 bits
        exact = np.array([math.fsum(column) for column in zip(*terms, strict=True)])
        exponent = math.frexp(max(np.abs(t).max() for t in terms))[1]
        grid = 2.0 ** -(62 - exponent - math.ceil(math.log2(num)))
        bound = num * grid / 2 + np.abs(exact) * 2.0**-52  # both are rounded to fp64
        assert (np.abs(got - exact) <= bound).all()


def test_busy_time_counts_helpers(pool: Any) -> None:
    ((*_, busy),) = pool.run(2, aggregate_dealt, 1, 3, [[0, 1, 0]], False, True)[0]
    assert busy == pytest.approx([0.5 + 2.5 + 1.5, 1.5 + 0.5 + 2.5])  # each rank reports some and helps with the rest


@pytest.mark.parametrize("size", [2, 4])
def test_fast_sums_are_near_the_exact_ones(pool: Any, size: int) -> None:
    num = 6
    ((delta, *_),) = pool.run(size, aggregate_dealt, 8, num, DEALINGS[:1], False, False)[0]
    terms = [vector(8, c, "delta").double().numpy() * HELD[c] for c in range(num)]
    # fp32 accumulation: each of num additions rounds to 2^-24 of a partial sum, which Σ|term| bounds.
    assert (np.abs(delta - sum(terms)) <= num * 2.0**-24 * sum(np.abs(t) for t in terms) + 1e-37).all()
