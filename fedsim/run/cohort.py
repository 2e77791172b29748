"""Local training of a round: the cohort on its lanes, then the round's one reduction."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

from fedsim.base.errors import ClientError, NotFiniteError, RunError
from fedsim.base.planner import Plan, SharedSteps, learned_cost, learned_sharing, plan_round
from fedsim.base.ranks import Lane, Ranks
from fedsim.config import FailuresConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import ClientOutcome, ServerState, Updates
from fedsim.federation.attacks import ActiveAttack
from fedsim.federation.client_state import ClientStateStore
from fedsim.federation.failures import ClientFailure, by_client, check_round, checked
from fedsim.parallel.updates import gather_updates
from fedsim.parallel.world import World
from fedsim.run.aggregate import Aggregated, aggregate
from fedsim.train.client import ClientTrainer
from fedsim.train.containment import ContainErrors, client_error


@dataclass(frozen=True, eq=False)
class LocalWork:
    """Work of this rank in a round's local training.

    Attributes:
        round_idx: the round.
        plan: how clients were placed.
        tokens: work of each client.
        shared: steps of each client, and what a step costs more on a wide lane.
        outcomes: clients that this rank took part in training.
        reporting: those of them that it reports: a wide lane reports once, from its first member.
        failures: clients that failed, as this rank saw it.
    """

    round_idx: int
    plan: Plan
    tokens: Mapping[int, int]
    shared: SharedSteps
    outcomes: list[ClientOutcome]
    reporting: list[ClientOutcome]
    failures: list[ClientFailure]


@dataclass(frozen=True, eq=False)
class CohortResult:
    """Result of a round's training, the same on every rank.

    Attributes:
        aggregated: sums and reports of the clients that delivered an update.
        updates: every such client's update, where the algorithm wants these in the place of sums.
        failures: clients that did not, ascending.
        plan: how clients were placed.
        seconds_per_token: updated cost of each rank.
        busy_s: seconds that each rank spent in local training, on clients that failed too.
    """

    aggregated: Aggregated
    failures: list[ClientFailure]
    plan: Plan
    seconds_per_token: tuple[float, ...]
    busy_s: list[float]
    updates: Updates | None = None

    @property
    def delivered(self) -> list[int]:
        """The clients whose updates were summed, ascending."""
        return [report.client for report in self.aggregated.clients]

    @property
    def idle_share(self) -> float:
        """Share of rank-seconds without local training, of the longest rank's time."""
        longest = max(self.busy_s)
        if longest <= 0:
            return 0.0
        return 1.0 - sum(self.busy_s) / (len(self.busy_s) * longest)


class CohortRunner:
    """Placement and training of a round's clients, and the sum of their updates.

    Args:
        world: all processes.
        trainer: this process's client trainer.
        shards: tokenised rows of every client, the same on every rank.
        controls: control variates of clients.
        failures: what a client's failure does to a round.
        wide_lanes: whether ranks may share a client.
        attacks: what some clients do to their updates.
    """

    def __init__(
        self,
        world: World,
        trainer: ClientTrainer,
        shards: Sequence[Sequence[TokenRow]],
        controls: ClientStateStore,
        failures: FailuresConfig,
        *,
        wide_lanes: bool,
        attacks: Sequence[ActiveAttack] = (),
    ) -> None:
        self.world = world
        self.attacks = attacks
        self.trainer = trainer
        self.shards = shards
        self.controls = controls
        self.failures = failures
        self.wide_lanes = wide_lanes
        self.num_micro_batches = trainer.local.num_micro_batches
        # Constant cost of a step on a wide lane, the same on every rank; after a resume it is
        # learnt again.
        self._sharing_s = 0.0

    def train(
        self,
        steps: Mapping[int, int],
        round_idx: int,
        state: ServerState,
        seconds_per_token: Sequence[float],
        on_step: Callable[[int, int], None] | None = None,
    ) -> LocalWork:
        """Train this rank's part of a cohort from ``state``; a client that fails is set aside.

        Control variates are written as soon as they are known; those of a client that another rank
        saw fail are never taken (:meth:`ClientStateStore.advance`), and deleted with the round's
        checkpoint.

        Args:
            steps: optimizer steps of each client; all have rows.
            round_idx: the round.
            state: the server's state at the beginning of the round.
            seconds_per_token: present cost of each rank.
            on_step: called with (steps done, steps of this rank).
        """
        tokens = {}  # work of each client
        for client, num_steps in steps.items():
            rows = self.shards[client]
            tokens[client] = self.trainer.num_tokens(client, rows, round_idx, num_steps)
        shared = SharedSteps(steps, self._sharing_s)
        plan = plan_round(
            tokens,
            seconds_per_token,
            self.num_micro_batches,
            wide_lanes=self.wide_lanes,
            shared=shared,
        )
        work = LocalWork(round_idx, plan, tokens, shared, [], [], [])
        self._train(work, steps, state, on_step)
        return work

    def reduce(
        self,
        work: LocalWork,
        state: ServerState,
        seconds_per_token: Sequence[float],
    ) -> CohortResult:
        """Agree on the clients that failed, and sum the others' updates: the round's one reduction.

        Args:
            work: of :meth:`train`.
            state: the server's state at the beginning of the round.
            seconds_per_token: present cost of each rank.

        Raises:
            RunError: clients failed and the policy ends the run; the same on every rank.
        """
        work = self._attack(work, state)

        # 1. Agree on failures; gather each member's seconds for clients on wide lanes.
        wide = {job.client for job in work.plan.jobs if job.width > 1}
        shared_s = {}
        for outcome in work.outcomes:
            if outcome.client in wide:
                shared_s[outcome.client] = outcome.seconds
        shares = self.world.ranks.gather((work.failures, shared_s))
        found = list(chain.from_iterable(rank_failures for rank_failures, _ in shares))
        failures = by_client(found)
        delivered = sorted(work.tokens.keys() - {failure.client for failure in failures})
        check_round(failures, len(delivered), work.round_idx, self.failures)

        # 2. Sum the updates, or gather them where the algorithm wants each client's.
        reporting = [outcome for outcome in work.reporting if outcome.client in delivered]
        updates = None
        has_control, size = self.trainer.algorithm.has_control, state.adapter.numel()
        if self.trainer.algorithm.wants == "updates":
            updates = self._updates(reporting, delivered, state)
            # The reduction then carries only the clients' figures.
            reporting = [replace(o, delta=o.delta[:0], control_delta=None) for o in reporting]
            has_control, size = False, 0
        result = aggregate(
            [outcome for outcome in work.outcomes if outcome.client in delivered],
            reporting,
            delivered,
            size=size,
            has_control=has_control,
            num_clients=len(self.shards),
            summer=self.world.everyone().summer,
            rank=self.world.rank,
            world_size=self.world.size,
            device=state.adapter.device,
        )

        # 3. Learn from the measured seconds for the next round's placement.
        tokens = {client: work.tokens[client] for client in delivered}
        cost = learned_cost(
            seconds_per_token,
            result.busy_s,
            work.plan,
            tokens,
            self.num_micro_batches,
            work.shared,
        )
        least_s: dict[int, float] = {}  # of each wide lane's client: the member that waited least
        for client in wide.intersection(delivered):
            least_s[client] = min(seconds[client] for _, seconds in shares if client in seconds)
        self._sharing_s = learned_sharing(
            work.shared,
            least_s,
            work.plan,
            tokens,
            cost,
            self.num_micro_batches,
        )
        busy_s = list(result.busy_s)  # by rank; failed clients count too
        for failure in found:
            busy_s[failure.rank] += failure.seconds
        return CohortResult(result, failures, work.plan, cost, busy_s, updates)

    def attackers(self, round_idx: int, cohort: Iterable[int]) -> list[int]:
        """Return the clients of a round's cohort that attack in it, ascending."""
        members = list(cohort)
        found: list[int] = []
        for attack in self.attacks:
            found.extend(attack.in_round(round_idx, members))
        return sorted(found)

    def _attack(self, work: LocalWork, state: ServerState) -> LocalWork:
        """Let attackers change their updates.

        A changed update that :func:`checked` refuses is a failure of the client.
        """
        cohort = list(work.tokens)
        attacks = []
        for attack in self.attacks:
            if attack.changes_outcomes and attack.in_round(work.round_idx, cohort):
                attacks.append(attack)
        if not attacks:
            return work
        # Only clients that no rank saw fail can attack.
        failed: set[int] = set()
        for rank_failures in self.world.ranks.gather(work.failures):
            failed.update(failure.client for failure in rank_failures)
        trained = sorted(work.tokens.keys() - failed)
        reporting = {outcome.client: outcome for outcome in work.reporting}
        failures = list(work.failures)

        def change(attack: ActiveAttack, members: Sequence[int], colluders: Updates) -> None:
            for client in members:
                if client not in reporting:  # another rank's
                    continue
                outcome = attack.changed_outcome(
                    reporting[client],
                    work.round_idx,
                    state,
                    colluders,
                )
                try:
                    reporting[client] = checked(outcome, self.failures.max_update_norm)
                except (ClientError, NotFiniteError) as error:
                    refused = client_error(error)
                    failure = ClientFailure(
                        client,
                        refused.reason,
                        self.world.rank,
                        refused.message,
                        "",
                        reporting[client].seconds,
                    )
                    failures.append(failure)

        # One attack after the other; its members see one another's updates.
        for attack in attacks:
            members = attack.in_round(work.round_idx, trained)
            colluders = self._updates(list(reporting.values()), members, state)
            self.world.ranks.each(functools.partial(change, attack, members, colluders))
        return replace(work, reporting=list(reporting.values()), failures=failures)

    def _updates(
        self,
        reporting: Sequence[ClientOutcome],
        clients: Sequence[int],
        state: ServerState,
    ) -> Updates:
        """Gather the updates of some clients on every rank."""
        return gather_updates(
            reporting,
            clients,
            size=state.adapter.numel(),
            has_control=self.trainer.algorithm.has_control,
            num_clients=len(self.shards),
            summer=self.world.everyone().summer,
            device=state.adapter.device,
        )

    def _train(
        self,
        work: LocalWork,
        steps: Mapping[int, int],
        state: ServerState,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        """Train this rank's jobs in the plan's order; record outcomes and failures in ``work``."""
        rank = self.world.rank
        # Every rank opens every wide lane, in the same order: a process group is a collective.
        lanes = {job: self.world.lane(job.first_rank, job.width) for job in work.plan.jobs}
        mine = [job for job in work.plan.jobs if rank in job.ranks]
        done, total = 0, sum(steps[job.client] for job in mine)
        for job in mine:
            report = None if on_step is None else _shifted(on_step, done, total)
            done += steps[job.client]
            began = time.perf_counter()
            try:
                with self.world.journal.at(client=job.client):
                    outcome = self._train_client(
                        job.client,
                        work.round_idx,
                        state,
                        lanes[job],
                        report,
                        steps[job.client],
                    )
            except ClientError as error:
                error.with_traceback(None)  # its frames hold the client's vectors
                seconds = time.perf_counter() - began
                reason, message, trace = error.reason, error.message, error.trace
                failure = ClientFailure(job.client, reason, rank, message, trace, seconds)
                work.failures.append(failure)
                self.world.journal.write("client failed", **asdict(failure))
                continue
            if outcome.control is not None:
                # On disk, so that a rank need not hold its whole cohort's; it is taken once all
                # ranks agree that the client did not fail.
                if job.first_rank == rank:
                    self.controls.save(job.client, work.round_idx, outcome.control)
                outcome = replace(outcome, control=None)
            work.outcomes.append(outcome)
            if job.first_rank == rank:
                work.reporting.append(outcome)

    def _train_client(
        self,
        client: int,
        round_idx: int,
        state: ServerState,
        lane: Lane,
        on_step: Callable[[int, int], None] | None,
        num_steps: int,
    ) -> ClientOutcome:
        """Train one client and check its update.

        Raises:
            ClientError: any of it failed. An error of a lane's shared sums is no client's, and ends
                the run.
        """
        errors = ContainErrors()
        control = errors.run(lambda: self.controls.load(client))
        rows = self.shards[client]
        outcome = self.trainer.train(
            client,
            rows,
            round_idx,
            state,
            control,
            lane,
            on_step,
            num_steps,
            errors,
        )
        errors.run(lambda: checked(outcome, self.failures.max_update_norm))
        errors.check()
        return outcome


def agreed_checksums(state: ServerState, ranks: Ranks) -> dict[str, str]:
    """Check that every rank holds the same vectors.

    Returns:
        BLAKE2b of each vector's bytes (hex), by the vector's name.

    Raises:
        RunError: ranks disagree.
    """
    own = {}
    for name, vector in state.named().items():
        content = vector.detach().cpu().numpy().tobytes()
        own[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
    found = ranks.gather(own)
    for name in own:
        digests = [digest[name] for digest in found]
        if len(set(digests)) != 1:
            what = f"different vectors {name} (checksums {', '.join(digests)})"
            raise RunError(f"ranks hold {what}; the run cannot go on")
    return own


def _shifted(
    report: Callable[[int, int], None],
    done: int,
    total: int,
) -> Callable[[int, int], None]:
    """Return ``report`` for the steps of a job before which ``done`` of ``total`` are done."""
    return lambda step, _: report(done + step, total)
