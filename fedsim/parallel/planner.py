"""Placement of a round's cohort on lanes so that the round ends soonest.

Heaviest clients first on single ranks; the last, incomplete wave on wider lanes that split each batch. The plan is a
pure function of its arguments, computed alike on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One client on one lane: ranks ``first_rank`` … ``first_rank + width − 1``."""

    client: int
    first_rank: int
    width: int
    start_s: float
    end_s: float

    @property
    def ranks(self) -> range:
        """The lane's ranks."""
        return range(self.first_rank, self.first_rank + self.width)


@dataclass(frozen=True)
class Plan:
    """Jobs in the order in which every rank runs its own.

    Attributes:
        makespan_s: predicted seconds until the last job ends.
        idle_share: predicted share of rank-seconds without work before that.
    """

    jobs: tuple[Job, ...]
    makespan_s: float
    idle_share: float


def plan_round(
    tokens: Mapping[int, int], seconds_per_token: Sequence[float], num_micro_batches: int, *, wide_lanes: bool
) -> Plan:
    """Place clients on ranks.

    Args:
        tokens: work of each client in the round.
        seconds_per_token: measured cost of each rank; its length is the world size.
        num_micro_batches: parts that a batch can be split into; a lane of width g is ⌈n/⌈n/g⌉⌉-fold faster at best.
        wide_lanes: whether several ranks may share a client.

    Returns:
        The plan with the least makespan; of equals, the one with the most clients on single ranks.
    """
    order = sorted(tokens, key=lambda c: (-tokens[c], c))
    world = len(seconds_per_token)
    best: Plan | None = None
    for num_single in range(len(order), -1, -1):
        if num_single < len(order) and (not wide_lanes or world == 1 or num_single < len(order) - world):
            break
        for widths in _lane_widths(len(order) - num_single, world):
            plan = _place(order, num_single, widths, tokens, seconds_per_token, num_micro_batches)
            if best is None or plan.makespan_s < best.makespan_s * (1 - 1e-9):
                best = plan
    assert best is not None
    return best


def learned_cost(
    known: Sequence[float], busy_s: Sequence[float], plan: Plan, tokens: Mapping[int, int], num_micro_batches: int
) -> tuple[float, ...]:
    """Seconds per token of each rank: half the old figure, half what this round measured; kept where nothing was.

    A wide job counts as the tokens that its slowest member computed, one of a client that is not in ``tokens``, as it
    failed, as none.
    """
    cost = list(known)
    for rank in range(len(cost)):
        work = sum(
            tokens.get(job.client, 0) * -(-num_micro_batches // job.width) / num_micro_batches
            for job in plan.jobs
            if rank in job.ranks
        )
        if work > 0 and busy_s[rank] > 0:
            cost[rank] = 0.5 * cost[rank] + 0.5 * busy_s[rank] / work
    return tuple(cost)


def useful_ranks(cohort_size: int, num_micro_batches: int, *, wide_lanes: bool) -> int:
    """The most ranks that local training can use: one a client, or one a micro-batch where ranks may share a client."""
    return cohort_size * (num_micro_batches if wide_lanes else 1)


def deal_units(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Units of work of each rank: heaviest first, each to the rank with the least so far."""
    loads = [0.0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[rank] += max(costs[unit], 1e-9)
        shares[rank].append(unit)
    return [sorted(share) for share in shares]


def speedup(width: int, num_micro_batches: int) -> float:
    """How much faster ``width`` ranks are that share ``num_micro_batches`` equal parts."""
    return num_micro_batches / math.ceil(num_micro_batches / width)


def _lane_widths(num_clients: int, world: int) -> Iterator[list[int]]:
    """Lanes for the wide clients: all side by side, or one after the other on all ranks."""
    if num_clients == 0:
        yield []
        return
    if num_clients <= world:
        yield [world // num_clients + (i < world % num_clients) for i in range(num_clients)]
    if num_clients > 1:
        yield [world] * num_clients


def _place(
    order: Sequence[int],
    num_single: int,
    widths: Sequence[int],
    tokens: Mapping[int, int],
    cost: Sequence[float],
    num_micro_batches: int,
) -> Plan:
    world = len(cost)
    free = [0.0] * world
    work = [0.0] * world
    jobs = []
    for client in order[:num_single]:
        rank = min(range(world), key=lambda r: (free[r] + tokens[client] * cost[r], r))
        end = free[rank] + tokens[client] * cost[rank]
        jobs.append(Job(client, rank, 1, free[rank], end))
        free[rank] = end
        work[rank] += tokens[client] * cost[rank]
    first = 0
    for client, width in zip(order[num_single:], widths, strict=True):
        ranks = range(first % world, first % world + width)
        start = max(free[r] for r in ranks)
        length = tokens[client] * max(cost[r] for r in ranks) / speedup(width, num_micro_batches)
        jobs.append(Job(client, ranks.start, width, start, start + length))
        for r in ranks:
            free[r] = start + length
            work[r] += length
        first += width
    makespan = max(free)
    idle = 1.0 - sum(work) / (world * makespan) if makespan > 0 else 0.0
    return Plan(tuple(jobs), makespan, idle)
