"""Placement of a round's cohort on lanes so that the round ends soonest.

Heaviest clients first on single ranks; the last, incomplete wave on wider lanes that split each batch. The plan is a
pure function of its arguments, computed alike on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final


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


@dataclass(frozen=True)
class SharedSteps:
    """Constant cost of optimizer steps on a wide lane, beside the lane's share of the tokens.

    However few rows a member has, it launches as many kernels, and each step ends with a sum over the lane.

    Attributes:
        num: optimizer steps of each client.
        seconds: cost of one step on a wide lane. A single rank's is part of its seconds per token.
    """

    num: Mapping[int, int]
    seconds: float = 0.0

    def of(self, client: int) -> float:
        """Seconds that a client's steps cost more on a wide lane."""
        return self.seconds * self.num.get(client, 0)


FREE: Final = SharedSteps({})
"""Sharing that costs nothing."""

FORGOTTEN: Final = 0.05
"""Share of a wide step's cost that a round without a wide lane takes off.

A cost that was measured too high, as in a round that compiles kernels, is so measured again some rounds later.
"""


def plan_round(
    tokens: Mapping[int, int],
    seconds_per_token: Sequence[float],
    num_micro_batches: int,
    *,
    wide_lanes: bool,
    shared: SharedSteps = FREE,
) -> Plan:
    """Place clients on ranks.

    Args:
        tokens: work of each client in the round.
        seconds_per_token: measured cost of each rank; its length is the world size.
        num_micro_batches: parts that a batch can be split into; a lane of width g is ⌈n/⌈n/g⌉⌉-fold faster at best.
        wide_lanes: whether several ranks may share a client.
        shared: steps of each client, and what a step costs more on a wide lane.

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
            plan = _place(order, num_single, widths, tokens, seconds_per_token, num_micro_batches, shared)
            if best is None or plan.makespan_s < best.makespan_s * (1 - 1e-9):
                best = plan
    assert best is not None
    return best


def learned_cost(
    known: Sequence[float],
    busy_s: Sequence[float],
    plan: Plan,
    tokens: Mapping[int, int],
    num_micro_batches: int,
    shared: SharedSteps = FREE,
) -> tuple[float, ...]:
    """Seconds per token of each rank: half the old figure, half what this round measured; kept where nothing was.

    A wide job counts as the tokens that its slowest member computed, and its time without the constant cost of its
    steps. A client that failed is not in ``tokens``, and its job does not count.
    """
    cost = list(known)
    for rank in range(len(cost)):
        jobs = [job for job in plan.jobs if rank in job.ranks and job.client in tokens]
        work = sum(tokens[job.client] / speedup(job.width, num_micro_batches) for job in jobs)
        busy = busy_s[rank] - sum(shared.of(job.client) for job in jobs if job.width > 1)
        if work > 0 and busy > 0:
            cost[rank] = 0.5 * cost[rank] + 0.5 * busy / work
    return tuple(cost)


def learned_sharing(
    shared: SharedSteps,
    seconds: Mapping[int, float],
    plan: Plan,
    tokens: Mapping[int, int],
    cost: Sequence[float],
    num_micro_batches: int,
) -> float:
    """Constant cost of a wide step: half the old figure, half the mean over this round's wide jobs, at least 0.

    A round without a wide job that was trained lowers the old figure by :data:`FORGOTTEN`.

    Args:
        shared: the round's steps, and the old figure.
        seconds: wall-clock time of each wide job by client, of the member that waited least.
        plan: how clients were placed.
        tokens: work of each client that was trained.
        cost: seconds per token of each rank.
        num_micro_batches: parts that a batch can be split into.
    """
    found = []
    for job in plan.jobs:
        if job.width > 1 and job.client in tokens and shared.num[job.client] > 0:
            of_tokens = tokens[job.client] * max(cost[r] for r in job.ranks) / speedup(job.width, num_micro_batches)
            found.append(max(0.0, seconds[job.client] - of_tokens) / shared.num[job.client])
    if not found:
        return (1.0 - FORGOTTEN) * shared.seconds
    return 0.5 * shared.seconds + 0.5 * sum(found) / len(found)


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
    shared: SharedSteps,
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
        length += shared.of(client) if width > 1 else 0.0
        jobs.append(Job(client, ranks.start, width, start, start + length))
        for r in ranks:
            free[r] = start + length
            work[r] += length
        first += width
    makespan = max(free)
    idle = 1.0 - sum(work) / (world * makespan) if makespan > 0 else 0.0
    return Plan(tuple(jobs), makespan, idle)
