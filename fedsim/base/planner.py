"""Placement of a round's cohort on lanes so that the round ends soonest.

Heaviest clients first on single ranks; the last, incomplete wave on wider lanes that split each
batch. The plan is a pure function of its arguments, computed alike on every rank.
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

    However few rows a member has, it launches as many kernels, and each step ends with a sum over
    the lane.

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

A cost that was measured too high, as in a round that compiles kernels, is so measured again some
rounds later.
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
        num_micro_batches: n parts that a batch can be split into; a lane of width g is at best
            n/⌈n/g⌉ times as fast.
        wide_lanes: several ranks may share a client.
        shared: steps of each client, and what a step costs more on a wide lane.

    Returns:
        The plan with the least makespan; of equals, the one with the most clients on single ranks.
    """
    # Heaviest clients first; the lightest ones share ranks: at most one client for each rank.
    order = sorted(tokens, key=lambda c: (-tokens[c], c))
    world = len(seconds_per_token)
    max_wide = min(len(order), world) if wide_lanes and world > 1 else 0

    # Try every number of wide clients and both layouts of their lanes; the first of equals stays.
    best: Plan | None = None
    for num_wide in range(max_wide + 1):
        num_single = len(order) - num_wide
        for widths in _lane_widths(num_wide, world):
            plan = _place(
                order,
                num_single,
                widths,
                tokens,
                seconds_per_token,
                num_micro_batches,
                shared,
            )
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
    """Seconds per token of each rank: half the old figure, half this round's measurement.

    A rank without a measurement keeps the old figure. A wide job counts as the tokens that its
    slowest member computed, and its time without the constant cost of its steps.

    Args:
        known: the old figures, in seconds per token.
        busy_s: seconds that each rank computed in this round.
        plan: placement of the clients.
        tokens: work of each client that was trained; the job of a failed client does not count.
        num_micro_batches: parts that a batch can be split into.
        shared: steps of each client, and the cost of a wide step.
    """
    cost = list(known)  # [ranks], seconds per token
    for rank in range(len(cost)):
        work = 0.0  # tokens
        sharing_s = 0.0
        for job in plan.jobs:
            if rank in job.ranks and job.client in tokens:
                work += tokens[job.client] / speedup(job.width, num_micro_batches)
                if job.width > 1:
                    sharing_s += shared.of(job.client)
        busy = busy_s[rank] - sharing_s  # seconds
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
    """Constant cost of a wide step: half the old figure, half the mean of this round's wide jobs.

    It is at least 0 seconds. A round without a wide job that was trained lowers the old figure by
    :data:`FORGOTTEN`.

    Args:
        shared: the round's steps, and the old figure.
        seconds: wall-clock time of each wide job by client, of the member that waited least.
        plan: placement of the clients.
        tokens: work of each client that was trained.
        cost: seconds per token of each rank.
        num_micro_batches: parts that a batch can be split into.
    """
    # Of each wide job, what its time exceeds its tokens' by, in seconds a step.
    found = []
    for job in plan.jobs:
        if job.width > 1 and job.client in tokens and shared.num[job.client] > 0:
            slowest = max(cost[rank] for rank in job.ranks)
            token_s = tokens[job.client] * slowest / speedup(job.width, num_micro_batches)
            found.append(max(0.0, seconds[job.client] - token_s) / shared.num[job.client])
    if not found:
        return (1.0 - FORGOTTEN) * shared.seconds
    return 0.5 * shared.seconds + 0.5 * sum(found) / len(found)


def useful_ranks(cohort_size: int, num_micro_batches: int, *, wide_lanes: bool) -> int:
    """Most ranks that local training can use: one a client; with wide lanes, one a micro-batch."""
    return cohort_size * (num_micro_batches if wide_lanes else 1)


def deal_units(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Units of work of each rank: heaviest first, each to the rank with the least so far."""
    loads = [0.0] * num_ranks  # cost of each rank's units so far
    shares: list[list[int]] = [[] for _ in range(num_ranks)]  # units of each rank
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[rank] += max(costs[unit], 1e-9)  # so that units without cost are dealt in turn
        shares[rank].append(unit)
    return [sorted(share) for share in shares]


def speedup(width: int, num_micro_batches: int) -> float:
    """Factor by which ``width`` ranks that share ``num_micro_batches`` equal parts are faster."""
    return num_micro_batches / math.ceil(num_micro_batches / width)


def _lane_widths(num_clients: int, world: int) -> Iterator[list[int]]:
    """Lanes for the wide clients: all side by side, or one after the other on all ranks."""
    if num_clients == 0:
        yield []
        return
    if num_clients <= world:  # side by side; the first lanes take the ranks that are left over
        share, rest = divmod(world, num_clients)
        yield [share + (i < rest) for i in range(num_clients)]
    if num_clients > 1:  # one after the other
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
    """Place the first ``num_single`` clients on single ranks, the others on lanes of ``widths``."""
    world = len(cost)
    free = [0.0] * world  # seconds from which on a rank is free
    work = [0.0] * world  # seconds of work
    jobs = []

    # Each single client goes to the rank that ends it first.
    for client in order[:num_single]:
        rank = min(range(world), key=lambda r: (free[r] + tokens[client] * cost[r], r))
        end = free[rank] + tokens[client] * cost[rank]
        jobs.append(Job(client, rank, 1, free[rank], end))
        free[rank] = end
        work[rank] += tokens[client] * cost[rank]

    # Wide clients go to consecutive ranks; a lane begins when its last rank is free.
    first = 0
    for client, width in zip(order[num_single:], widths, strict=True):
        ranks = range(first % world, first % world + width)
        start = max(free[r] for r in ranks)
        slowest = max(cost[r] for r in ranks)
        length = tokens[client] * slowest / speedup(width, num_micro_batches)  # seconds
        if width > 1:
            length += shared.of(client)
        jobs.append(Job(client, ranks.start, width, start, start + length))
        for r in ranks:
            free[r] = start + length
            work[r] += length
        first += width

    makespan = max(free)
    idle = 0.0
    if makespan > 0:
        idle = 1.0 - sum(work) / (world * makespan)
    return Plan(tuple(jobs), makespan, idle)
