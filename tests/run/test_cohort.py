"""A round's local training over a trainer that records what it is handed, on one rank and on several."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedsim.base.errors import ClientError, RunError
from fedsim.base.planner import Job, Plan, SharedSteps
from fedsim.base.ranks import OneRank
from fedsim.config import AttackConfig, FailuresConfig, LocalConfig
from fedsim.federation.algorithms import ClientOutcome, ServerState, Updates
from fedsim.federation.attacks import ActiveAttack, Attack
from fedsim.federation.client_state import ClientStateStore
from fedsim.federation.failures import ClientFailure
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import World
from fedsim.run.cohort import CohortResult, CohortRunner, LocalWork, agreed_checksums

CPU = torch.device("cpu")
SIZE = 4
ROUND = 6
SHARDS: list[Any] = [[f"row {i} of client {client}" for i in range(2 + client)] for client in range(9)]
STATE = ServerState(torch.tensor([1.0, 2.0, 3.0, 4.0]), {"control": torch.ones(SIZE)})
STEPS = {1: 2, 4: 3, 7: 3}
TOKENS = {1: 2 * 110, 4: 3 * 140, 7: 3 * 170}
SKIP = FailuresConfig(on_client_error="skip", min_clients=0)


def control_of(client: int, round_idx: int) -> torch.Tensor:
    return torch.full((SIZE,), 100.0 * client + round_idx)


class Trainer:
    """A trainer whose deltas hold the client's number, and control variates :func:`control_of` client and round.

    Attributes:
        seen: what was handed in, by client.
        spoilt: clients, and what happens to them.
    """

    def __init__(self, has_control: bool) -> None:
        self.local = LocalConfig(batch_size=7, micro_batch_size=2)
        self.algorithm = SimpleNamespace(has_control=has_control, wants="sums")
        self.seen: dict[int, tuple[Any, ...]] = {}
        self.spoilt: dict[int, str] = {}

    def num_tokens(self, client: int, rows: Any, round_idx: int, num_steps: int) -> int:
        assert rows is SHARDS[client] and round_idx == ROUND
        return num_steps * (100 + 10 * client)

    def train(
        self, client: int, rows: Any, round_idx: int, state: ServerState, control: torch.Tensor | None, lane: Any,
        on_step: Callable[[int, int], None] | None, num_steps: int, errors: Any,
    ) -> ClientOutcome:  # fmt: skip
        self.seen[client] = (rows, round_idx, state, control, (lane.index, lane.size), num_steps)
        for step in range(num_steps):
            if on_step is not None:
                on_step(step + 1, num_steps)
        if self.spoilt.get(client) == "raises":
            raise ClientError("raised", "it rains", "trace")
        if self.spoilt.get(client) == "does not compute":
            errors.run(lambda: 1 // 0)
        delta = torch.full((SIZE,), torch.nan if self.spoilt.get(client) == "is NaN" else float(client))
        control = control_of(client, round_idx) if self.algorithm.has_control else None
        change = None if control is None else torch.full((SIZE,), 10.0 + client)
        return ClientOutcome(
            client, len(rows), float(len(rows)), delta, control, change, 0.5 * client, 1.0 * client, 1000 + client,
            seconds=2.0 * client,
        )  # fmt: skip


class OneOfMany(OneRank):
    """One of several processes; the values of the others are given."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self.others: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


class ManyWorld(World):
    """A world whose lanes have no process groups; records which are asked for."""

    def lane(self, first_rank: int, width: int) -> Any:
        self.__dict__.setdefault("asked", []).append((first_rank, width))
        return SimpleNamespace(index=self.rank - first_rank, size=width, summer=Summer(None, exact=True))


class Cohort:
    """A runner of three clients on a rank of a world."""

    def __init__(
        self, folder: Path, *, ranks: Any = None, has_control: bool = True, wide: bool = True,
        failures: FailuresConfig = SKIP, attacks: Sequence[Any] = (), wants: str = "sums",
    ) -> None:  # fmt: skip
        self.world = ManyWorld(ranks or OneRank(), CPU, exact=True)
        self.world.journal.open(folder)
        self.folder = folder
        self.controls = ClientStateStore(folder / "controls")
        self.trainer: Any = Trainer(has_control)
        self.trainer.algorithm.wants = wants
        self.runner = CohortRunner(
            self.world, self.trainer, SHARDS, self.controls, failures, wide_lanes=wide, attacks=attacks
        )

    def train(
        self, cost: Sequence[float] = (1e-3,), on_step: Any = None, steps: Mapping[int, int] = STEPS
    ) -> LocalWork:
        return self.runner.train(steps, ROUND, STATE, cost, on_step)

    @property
    def journal(self) -> list[dict[str, Any]]:
        (file,) = (self.folder / "logs").iterdir()
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture()
def cohort(tmp_path: Path) -> Callable[..., Cohort]:
    """``cohort(ranks=, has_control=, wide=, failures=, attacks=, wants=)``: see :class:`Cohort`."""
    return lambda **named: Cohort(tmp_path, **named)


Make = Callable[..., Cohort]


def test_each_client_trains_from_the_state_on_its_own_rows_and_control_variate(cohort: Make) -> None:
    made = cohort()
    made.controls.save(4, 3, control_of(4, 3))
    made.controls.advance([4], 3)
    work = made.train()
    assert set(made.trainer.seen) == set(STEPS)
    for client, (rows, round_idx, state, control, lane, num_steps) in made.trainer.seen.items():
        assert rows is SHARDS[client] and state is STATE
        assert (round_idx, lane, num_steps) == (ROUND, (0, 1), STEPS[client])
        assert control is None if client != 4 else torch.equal(control, control_of(4, 3))
    assert (work.round_idx, work.tokens) == (ROUND, TOKENS)
    assert [job.client for job in work.plan.jobs] == [7, 4, 1], "heaviest first"
    assert [outcome.client for outcome in work.outcomes] == [7, 4, 1] and work.failures == []
    assert work.reporting == work.outcomes
    assert [entry["client"] for entry in made.journal if entry["event"] == "begin"] == [7, 4, 1]


def test_control_variates_are_on_disk_and_not_in_memory(cohort: Make) -> None:
    made = cohort()
    work = made.train()
    assert all(outcome.control is None and outcome.control_delta is not None for outcome in work.outcomes)
    assert made.controls.index == {}, "they count once all ranks have agreed"
    made.controls.advance(STEPS, ROUND)
    assert all(torch.equal(made.controls.load(client), control_of(client, ROUND)) for client in STEPS)


def test_without_control_variates_none_is_written(cohort: Make) -> None:
    made = cohort(has_control=False)
    made.train()
    assert list(made.controls.folder.iterdir()) == []


def test_progress_counts_the_steps_of_all_clients_of_this_rank(cohort: Make) -> None:
    told: list[tuple[int, int]] = []
    cohort().train(on_step=lambda done, total: told.append((done, total)))
    assert told == [(step, 8) for step in range(1, 9)]


def test_a_client_that_fails_is_set_aside_and_the_others_go_on(cohort: Make) -> None:
    """Every kind of failure; the progress counts on behind it."""
    made = cohort(failures=FailuresConfig(on_client_error="skip", min_clients=0, max_update_norm=13.0))
    made.trainer.spoilt = {1: "raises", 2: "does not compute", 3: "is NaN"}
    told: list[tuple[int, int]] = []
    work = made.train(steps={1: 2, 2: 1, 3: 1, 5: 2, 7: 2}, on_step=lambda done, total: told.append((done, total)))
    reasons = {failure.client: failure.reason for failure in work.failures}
    assert reasons == {1: "raised", 2: "raised", 3: "not finite", 7: "norm"}, "7 · √4 > 13 > 5 · √4"
    assert [outcome.client for outcome in work.outcomes] == [5] == [outcome.client for outcome in work.reporting]
    assert {path.name for path in made.controls.folder.iterdir()} == {f"client000005-round{ROUND + 1:06d}.safetensors"}
    assert told == [(step, 8) for step in range(1, 9)]
    (rain,) = [failure for failure in work.failures if failure.client == 1]
    assert (rain.rank, rain.message, rain.trace) == (0, "it rains", "trace") and rain.seconds > 0
    logged = [entry for entry in made.journal if entry["event"] == "client failed"]
    assert {entry["client"]: entry["reason"] for entry in logged} == reasons


def test_a_torn_control_variate_is_its_client_s_failure(cohort: Make) -> None:
    made = cohort()
    made.controls.advance([4], 3)  # whose file does not exist
    work = made.train()
    assert [failure.client for failure in work.failures] == [4]
    assert {outcome.client for outcome in work.outcomes} == {1, 7}


def test_a_rank_trains_its_own_jobs_and_reports_those_that_it_leads(cohort: Make) -> None:
    """Three clients on two ranks: two on one rank each, the last on both, which the first of them reports."""
    led = {}
    for rank in (0, 1):
        made = cohort(ranks=OneOfMany(rank, 2))
        told: list[tuple[int, int]] = []
        work = made.train((1e-3, 1e-3), lambda done, total, told=told: told.append((done, total)))
        assert [(job.client, job.first_rank, job.width) for job in work.plan.jobs] == [(7, 0, 1), (4, 1, 1), (1, 0, 2)]
        assert made.world.__dict__["asked"] == [(0, 1), (1, 1), (0, 2)], "every rank asks for every lane, in one order"
        assert {c: seen[4] for c, seen in made.trainer.seen.items()} == {(7, 4)[rank]: (0, 1), 1: (rank, 2)}
        assert [outcome.client for outcome in work.outcomes] == [(7, 4)[rank], 1]
        led[rank] = [outcome.client for outcome in work.reporting]
        assert told == [(step, 5) for step in range(1, 6)]
        mine = {f"client{c:06d}-round{ROUND + 1:06d}.safetensors" for c in led[rank]}
        assert {path.name for path in made.controls.folder.iterdir()} == mine
        for path in made.controls.folder.iterdir():
            path.unlink()
    assert led == {0: [7, 1], 1: [4]}


def test_no_lane_is_wide_where_that_is_not_wanted(cohort: Make) -> None:
    made = cohort(ranks=OneOfMany(0, 2), wide=False)
    assert {job.width for job in made.train((1e-3, 1e-3)).plan.jobs} == {1}


def test_lanes_are_planned_from_what_ranks_cost(cohort: Make) -> None:
    """A rank that costs ten times as much gets no client of its own."""
    work = cohort(ranks=OneOfMany(0, 2), wide=False).train((1e-3, 1e-2))
    assert {job.first_rank for job in work.plan.jobs} == {0}


def test_the_reduction_sums_updates_and_learns_what_ranks_cost(cohort: Make) -> None:
    made = cohort()
    work = made.train()
    result = made.runner.reduce(work, STATE, (1e-3,))
    rows = {client: len(SHARDS[client]) for client in STEPS}
    sums = result.aggregated.sums
    assert sums.weighted_delta.tolist() == [float(sum(client * n for client, n in rows.items()))] * SIZE
    assert sums.control_delta is not None and sums.control_delta.tolist() == [30.0 + 12.0] * SIZE
    assert (sums.weight, sums.num_clients) == (sum(rows.values()), len(SHARDS))
    assert result.delivered == [1, 4, 7] and result.failures == [] and result.plan is work.plan
    busy = 2.0 * (1 + 4 + 7)
    assert result.busy_s == [busy]
    assert result.seconds_per_token == pytest.approx((0.5 * 1e-3 + 0.5 * busy / sum(TOKENS.values()),))


def test_without_control_variates_there_is_no_sum_of_them(cohort: Make) -> None:
    made = cohort(has_control=False)
    assert made.runner.reduce(made.train(), STATE, (1e-3,)).aggregated.sums.control_delta is None


def test_what_any_rank_saw_fail_is_in_no_sum(cohort: Make) -> None:
    """This rank holds outcomes of clients 7 and 1; the other saw client 1, which both trained, fail."""
    ranks = OneOfMany(0, 2)
    made = cohort(ranks=ranks)
    work = made.train((1e-3, 1e-3))
    ranks.others = [([ClientFailure(1, "raised", 1, "it rains", seconds=3.5)], {})]
    result = made.runner.reduce(work, STATE, (1e-3, 1e-3))
    assert result.delivered == [4, 7]
    assert result.aggregated.sums.weighted_delta.tolist() == [7.0 * len(SHARDS[7])] * SIZE, "of this rank's clients"
    assert [(failure.client, failure.rank) for failure in result.failures] == [(1, 1)]
    assert result.busy_s == [14.0, 3.5], "the time of a client that failed counts"
    cost = 0.5 * 1e-3 + 0.5 * 14.0 / TOKENS[7]  # its tokens do not
    assert result.seconds_per_token == pytest.approx((cost, 1e-3))


def test_a_wide_lane_s_client_is_summed_once_and_takes_each_member_s_time(cohort: Make) -> None:
    """Rank 1 trained client 4 alone and client 1 with rank 0, which reports it."""
    ranks = OneOfMany(1, 2)
    made = cohort(ranks=ranks)
    work = made.train((1e-3, 1e-3))
    ranks.others = [([], {1: 1.5})]
    result = made.runner.reduce(work, STATE, (1e-3, 1e-3))
    assert result.delivered == [1, 4, 7]
    assert result.aggregated.sums.weighted_delta.tolist() == [4.0 * len(SHARDS[4])] * SIZE, "of what this rank reports"
    assert result.busy_s == [0.0, 2.0 * (4 + 1)]
    assert made.world.__dict__["asked"][-1] == (0, 2), "the sum is over all ranks"


def test_the_next_round_is_planned_with_what_a_shared_step_cost(cohort: Make) -> None:
    """Client 1, two steps on two ranks: here it took 2 s, on the other rank, which waited less, 1.5 s."""
    ranks = OneOfMany(1, 2)
    made = cohort(ranks=ranks)
    work = made.train((1e-3, 1e-3))
    assert work.shared == SharedSteps(STEPS, 0.0)
    ranks.others = [([], {1: 1.5})]
    result = made.runner.reduce(work, STATE, (1e-3, 1e-3))
    cost = 0.5 * 1e-3 + 0.5 * 2.0 * (4 + 1) / (TOKENS[4] + TOKENS[1] / 2)  # of rank 1, in seconds per token
    assert result.seconds_per_token == pytest.approx((1e-3, cost))
    seconds = 0.5 * (1.5 - cost * TOKENS[1] / 2) / STEPS[1]
    again = made.train((1e-3, 1e-3))
    assert again.shared.num == STEPS and again.shared.seconds == pytest.approx(seconds)
    assert {job.width for job in again.plan.jobs} == {1}, "sharing would cost 0.2 s and save 0.11 s"


def test_a_failure_names_its_rank_and_keeps_none_of_the_client_s_memory(cohort: Make) -> None:
    made = cohort(ranks=OneOfMany(1, 2))
    held: list[weakref.ref[Any]] = []

    def fail(*_: Any) -> ClientOutcome:
        vectors = Trainer(has_control=False)  # stands for what a client's frames hold
        held.append(weakref.ref(vectors))
        raise ClientError("raised", "it rains")

    made.trainer.train = fail
    assert [(failure.client, failure.rank) for failure in made.train((1e-3, 1e-3)).failures] == [(4, 1), (1, 1)]
    assert [reference() for reference in held] == [None, None]


def test_a_failure_ends_the_run_where_the_policy_says_so(cohort: Make) -> None:
    made = cohort(failures=FailuresConfig(on_client_error="stop"))
    made.trainer.spoilt = {4: "raises"}
    work = made.train()
    with pytest.raises(
        RunError, match=r"^client 4 failed \(raised\): it rains; set failures\.on_client_error"
    ) as caught:
        made.runner.reduce(work, STATE, (1e-3,))
    assert caught.value.place["round"] == ROUND + 1


@pytest.mark.parametrize("min_clients", [2, 3])
def test_too_few_clients_end_the_run(cohort: Make, min_clients: int) -> None:
    made = cohort(failures=FailuresConfig(on_client_error="skip", min_clients=min_clients))
    made.trainer.spoilt = {4: "raises"}
    work = made.train()
    if min_clients == 2:
        assert made.runner.reduce(work, STATE, (1e-3,)).delivered == [1, 7]
        return
    with pytest.raises(RunError, match=r"2 client\(s\) delivered an update, fewer than failures\.min_clients=3"):
        made.runner.reduce(work, STATE, (1e-3,))


@pytest.mark.parametrize(("busy", "share"), [([2.0, 4.0], 0.25), ([3.0, 3.0], 0.0), ([0.0, 0.0], 0.0), ([5.0], 0.0)])
def test_idle_share_is_of_the_longest_rank_s_time(busy: list[float], share: float) -> None:
    result = CohortResult(None, [], Plan((Job(0, 0, 1, 0.0, 1.0),), 1.0, 0.0), (), busy)  # type: ignore[arg-type]
    assert result.idle_share == share


def test_checksums_are_of_the_bytes_of_each_vector() -> None:
    found = agreed_checksums(STATE, OneRank())
    assert list(found) == ["adapter", "control"]
    for name, vector in STATE.named().items():
        assert found[name] == hashlib.blake2b(vector.numpy().tobytes(), digest_size=16).hexdigest()


@pytest.mark.parametrize("name", ["adapter", "control"])
def test_ranks_that_hold_different_vectors_end_the_run(name: str) -> None:
    ranks, mine = OneOfMany(0, 2), agreed_checksums(STATE, OneRank())
    ranks.others = [{**mine}]
    assert agreed_checksums(STATE, ranks) == mine
    ranks.others = [{**mine, name: "another"}]
    with pytest.raises(RunError, match=rf"ranks hold different vectors {name} \(checksums {mine[name]}, another\)"):
        agreed_checksums(STATE, ranks)


# ---- every client's update, and attackers ------------------------------------------------------------------------


class Double(Attack):
    """Reports the sum of the attackers' updates twice, and remembers who they were."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def outcome(
        self, outcome: ClientOutcome, state: ServerState, rng: np.random.Generator, colluders: Updates
    ) -> ClientOutcome:
        self.seen.append(colluders.clients)
        assert outcome.control_delta is not None and colluders.control_deltas is not None
        return replace(outcome, delta=2 * colluders.deltas.sum(dim=0), weight=9.0)


def double(*clients: int, **rounds: int) -> list[ActiveAttack]:
    Double.seen.clear()
    return [ActiveAttack(0, AttackConfig(kind="my.py:Double", share=0.5, **rounds), Double(), clients, seed=0)]


def test_a_rule_that_wants_updates_gets_them_by_ascending_client(cohort: Make) -> None:
    made = cohort(wants="updates")
    made.trainer.spoilt = {4: "raises"}
    found = made.runner.reduce(made.train(), STATE, (1e-3,))
    updates = found.updates
    assert updates is not None and updates.clients == (1, 7) and updates.num_clients == len(SHARDS)
    assert updates.deltas.tolist() == [[1.0] * SIZE, [7.0] * SIZE]
    assert updates.weights.tolist() == [3.0, 9.0] and updates.weights.dtype == torch.float64
    assert updates.control_deltas is not None and updates.control_deltas[:, 0].tolist() == [11.0, 17.0]
    assert found.aggregated.sums.weighted_delta.numel() == 0, "nothing is summed that nobody asked for"
    assert [report.loss for report in found.aggregated.clients] == [0.5, 3.5]


def test_attackers_see_one_another_and_no_one_else(cohort: Make) -> None:
    made = cohort(attacks=double(1, 2, 7))
    found = made.runner.reduce(made.train(), STATE, (1e-3,))
    assert Double.seen == [(1, 7), (1, 7)]
    assert found.aggregated.sums.weighted_delta.tolist() == [9 * 2 * 8.0 * 2 + 6 * 4.0] * SIZE
    assert found.aggregated.sums.weight == 9 + 9 + 6
    assert made.runner.attackers(ROUND, STEPS) == [1, 7]


def test_an_attacker_that_failed_reports_nothing_and_is_no_colluder(cohort: Make) -> None:
    made = cohort(attacks=double(1, 4))
    made.trainer.spoilt = {4: "raises"}
    found = made.runner.reduce(made.train(), STATE, (1e-3,))
    assert Double.seen == [(1,)] and found.delivered == [1, 7]


def test_the_bound_on_updates_holds_for_an_attack(cohort: Make) -> None:
    """Client 4's honest update of norm 8 passes; what it makes of it does not."""
    made = cohort(attacks=double(4), failures=replace(SKIP, max_update_norm=15.0))
    found = made.runner.reduce(made.train(), STATE, (1e-3,))
    assert [(failure.client, failure.reason) for failure in found.failures] == [(4, "norm")]
    assert found.delivered == [1, 7]


def test_outside_its_rounds_an_attack_does_nothing(cohort: Make) -> None:
    plain = cohort().runner
    for rounds in ({"from_round": ROUND + 2}, {"until_round": ROUND}):
        made = cohort()
        made.runner.attacks = double(1, 4, 7, **rounds)
        found = made.runner.reduce(made.train(), STATE, (1e-3,))
        assert Double.seen == [] and made.runner.attackers(ROUND, STEPS) == plain.attackers(ROUND, STEPS) == []
        assert found.aggregated.sums.weighted_delta.tolist() == [3 * 1.0 + 6 * 4.0 + 9 * 7.0] * SIZE
