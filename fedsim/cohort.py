"""A round's local training: the cohort on its lanes, then the one reduction that ends it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedsim.data.chat import TokenRow
from fedsim.errors import RunError
from fedsim.federation.algorithms import ServerState
from fedsim.federation.client_state import ClientStateStore
from fedsim.federation.outcome import ClientOutcome
from fedsim.parallel.aggregate import Aggregated, aggregate
from fedsim.parallel.planner import Plan, plan_round
from fedsim.parallel.world import World
from fedsim.ranks import Ranks
from fedsim.train.client import ClientTrainer


@dataclass(frozen=True, eq=False)
class LocalWork:
    """What this rank did in a round's local training.

    Attributes:
        round_idx: the round.
        plan: how clients were placed.
        tokens: work of each client.
        outcomes: clients that this rank took part in training.
        reporting: those of them that it reports: a wide lane reports once, from its first member.
    """

    round_idx: int
    plan: Plan
    tokens: Mapping[int, int]
    outcomes: list[ClientOutcome]
    reporting: list[ClientOutcome]


@dataclass(frozen=True, eq=False)
class CohortResult:
    """What a round's training gave, the same on every rank.

    Attributes:
        aggregated: sums and reports.
        plan: how clients were placed.
        seconds_per_token: updated cost of each rank.
        idle_share: share of rank-seconds without local training, of the longest rank's time.
    """

    aggregated: Aggregated
    plan: Plan
    seconds_per_token: tuple[float, ...]
    idle_share: float


class CohortRunner:
    """Places clients, trains them and sums their updates.

    Args:
        world: all processes.
        trainer: this process's client trainer.
        shards: tokenised rows of every client, the same on every rank.
        controls: control variates of clients.
        wide_lanes: whether ranks may share a client.
    """

    def __init__(
        self,
        world: World,
        trainer: ClientTrainer,
        shards: Sequence[Sequence[TokenRow]],
        controls: ClientStateStore,
        *,
        wide_lanes: bool,
    ) -> None:
        self.world = world
        self.trainer = trainer
        self.shards = shards
        self.controls = controls
        self.wide_lanes = wide_lanes
        local = trainer.local
        self.num_micro_batches = -(-local.batch_size // local.micro_batch_size)

    def train(
        self,
        cohort: Sequence[int],
        round_idx: int,
        state: ServerState,
        seconds_per_token: Sequence[float],
        on_step: Callable[[int, int], None] | None = None,
    ) -> LocalWork:
        """Train this rank's part of ``cohort`` (all have rows) from ``state``; control variates are written to disk."""
        tokens = {c: self.trainer.num_tokens(c, self.shards[c], round_idx) for c in cohort}
        plan = plan_round(tokens, seconds_per_token, self.num_micro_batches, wide_lanes=self.wide_lanes)
        outcomes, reporting = self._train(plan, round_idx, state, on_step)
        return LocalWork(round_idx, plan, tokens, outcomes, reporting)

    def reduce(self, work: LocalWork, state: ServerState, seconds_per_token: Sequence[float]) -> CohortResult:
        """Sum the updates over all ranks: the one reduction of the round."""
        result = aggregate(
            work.outcomes,
            work.reporting,
            sorted(work.tokens),
            size=state.adapter.numel(),
            has_control=self.trainer.algorithm.has_control,
            num_clients=len(self.shards),
            summer=self.world.everyone().summer,
            rank=self.world.rank,
            world_size=self.world.size,
            device=state.adapter.device,
        )
        cost = learned_cost(seconds_per_token, result.busy_s, work.plan, work.tokens, self.num_micro_batches)
        longest = max(result.busy_s)
        idle = 1.0 - sum(result.busy_s) / (self.world.size * longest) if longest > 0 else 0.0
        return CohortResult(result, work.plan, cost, idle)

    def _train(
        self, plan: Plan, round_idx: int, state: ServerState, on_step: Callable[[int, int], None] | None
    ) -> tuple[list[ClientOutcome], list[ClientOutcome]]:
        """This rank's jobs in the plan's order. Every rank asks for every wide lane, in the same order."""
        lanes = {job: self.world.lane(job.first_rank, job.width) for job in plan.jobs}
        mine = [job for job in plan.jobs if self.world.rank in job.ranks]
        steps = self.trainer.num_steps
        outcomes, reporting = [], []
        for index, job in enumerate(mine):
            done = index * steps
            report = None if on_step is None else _shifted(on_step, done, steps * len(mine))
            outcome = self.trainer.train(
                job.client,
                self.shards[job.client],
                round_idx,
                state,
                self.controls.load(job.client),
                lanes[job],
                report,
            )
            if outcome.control is not None:
                if job.first_rank == self.world.rank:
                    self.controls.save(job.client, round_idx, outcome.control)
                outcome = replace(outcome, control=None)  # on disk: a rank's whole cohort need not be held in memory
            outcomes.append(outcome)
            if job.first_rank == self.world.rank:
                reporting.append(outcome)
        return outcomes, reporting


def learned_cost(
    known: Sequence[float], busy_s: Sequence[float], plan: Plan, tokens: Mapping[int, int], num_micro_batches: int
) -> tuple[float, ...]:
    """Seconds per token of each rank: half the old figure, half what this round measured; kept where nothing was.

    A wide job counts as the tokens that its slowest member computed.
    """
    cost = list(known)
    for rank in range(len(cost)):
        work = sum(
            tokens[job.client] * -(-num_micro_batches // job.width) / num_micro_batches
            for job in plan.jobs
            if rank in job.ranks
        )
        if work > 0 and busy_s[rank] > 0:
            cost[rank] = 0.5 * cost[rank] + 0.5 * busy_s[rank] / work
    return tuple(cost)


def agreed_checksums(state: ServerState, ranks: Ranks) -> dict[str, str]:
    """BLAKE2b of each vector's bytes (hex) by the vector's name, after proof that every rank holds the same ones.

    Raises:
        RunError: ranks disagree.
    """
    own = {
        name: hashlib.blake2b(vector.detach().cpu().numpy().tobytes(), digest_size=16).hexdigest()
        for name, vector in state.named().items()
    }
    found = ranks.gather(own)
    for name in own:
        digests = [digest[name] for digest in found]
        if len(set(digests)) != 1:
            raise RunError(
                f"ranks hold different vectors {name} (checksums {', '.join(digests)}); the run cannot go on"
            )
    return own


def _shifted(report: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    return lambda step, _: report(done + step, total)
