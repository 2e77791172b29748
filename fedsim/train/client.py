"""One client's local training in one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim.base import reused
from fedsim.base.ranks import Lane
from fedsim.base.rounds import round_number
from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import Algorithm, ClientOutcome, Correction, ServerState
from fedsim.federation.participation import cosine_by_round, sample_rows
from fedsim.federation.scaffold import CONTROL
from fedsim.train.containment import OwnWork
from fedsim.train.loop import Trainer, TrainingPlan, TrainingStats
from fedsim.train.objectives import SftObjective

OWN_WORK = OwnWork()


class ClientTrainer:
    """Trains clients, one after the other, on this process's resident model.

    Args:
        trainer: model, flat adapter and optimizer.
        algorithm: the federated algorithm.
        local: the local-training configuration.
        num_steps: optimizer steps of a client that is no straggler in a round.
        num_rounds: length of the run, for the learning rate.
        seed: the run's seed.
        pass_tokens: most tokens of a pass outside exact mode; 0: ``micro_batch_size`` times ``max_length``.
    """

    def __init__(
        self,
        trainer: Trainer,
        algorithm: Algorithm,
        objective: SftObjective,
        local: LocalConfig,
        num_steps: int,
        num_rounds: int,
        seed: int,
        pass_tokens: int = 0,
    ) -> None:
        self.trainer = trainer
        self.algorithm = algorithm
        self.objective = objective
        self.local = local
        self.num_steps = num_steps
        self.num_rounds = num_rounds
        self.seed = seed
        self.pass_tokens = pass_tokens

    def batches(
        self, client: int, rows: Sequence[TokenRow], round_idx: int, num_steps: int | None = None
    ) -> list[list[TokenRow]]:
        """The rows of each local step; those of a straggler's ``num_steps`` are the first of them."""
        size = self.local.batch_size
        num_steps = self.num_steps if num_steps is None else num_steps
        drawn = sample_rows(len(rows), num_steps * size, round_idx, client, self.seed)
        return [[rows[i] for i in drawn[start : start + size]] for start in range(0, len(drawn), size)]

    def num_tokens(self, client: int, rows: Sequence[TokenRow], round_idx: int, num_steps: int | None = None) -> int:
        """Tokens that the client will train on in a round: its work, for the planner."""
        return sum(len(row) for batch in self.batches(client, rows, round_idx, num_steps) for row in batch)

    def train(
        self,
        client: int,
        rows: Sequence[TokenRow],
        round_idx: int,
        state: ServerState,
        client_control: torch.Tensor | None,
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
        num_steps: int | None = None,
        own: OwnWork = OWN_WORK,
    ) -> ClientOutcome:
        """Train from the global adapter with a new AdamW; the model is left holding the client's adapter.

        Args:
            num_steps: optimizer steps, where they are not :attr:`num_steps`.
            own: runs what this member computes apart from the lane's sums; if it contains errors, all the lane's sums
                are joined before one leaves.

        Raises:
            NotFiniteError: a loss, gradient or the adapter was not finite.
            ClientError: ``own`` has kept an error.
        """
        began = time.perf_counter()
        task = _Task(client, rows, round_idx, state, client_control, self.num_steps if num_steps is None else num_steps)
        plan = own.do(lambda: self._plan(task, own))
        if plan is None:
            plan = TrainingPlan([[]] * task.num_steps, lambda step: 0.0, ("failed",), own=own)
        stats = self.trainer.run(plan, self.objective, lane, on_step)
        outcome = own.do(lambda: self._outcome(task, plan.correction, stats, began))
        own.check()
        assert outcome is not None
        return outcome

    def _plan(self, task: _Task, own: OwnWork) -> TrainingPlan[TokenRow]:
        """The client's steps, with the global adapter in the model."""
        lr = self._lr(task.round_idx)
        self.trainer.adapter.load(task.state.adapter)
        return TrainingPlan(
            batches=self.batches(task.client, task.rows, task.round_idx, task.num_steps),
            lr=lambda step: lr,
            key=("local", task.round_idx, task.client),
            what=f"client {task.client}, round {round_number(task.round_idx)}",
            correction=self.algorithm.correction(task.state, task.control),
            longest=self.local.max_length,
            pass_tokens=self.pass_tokens,
            own=own,
        )

    def _outcome(self, task: _Task, correction: Correction, stats: TrainingStats, began: float) -> ClientOutcome:
        """What the client reports, once its steps are done."""
        start, end = task.state.adapter, self.trainer.adapter.values
        control = control_delta = None
        if self.algorithm.has_control:
            previous = torch.zeros_like(task.state.vectors[CONTROL]) if task.control is None else task.control
            control = correction.next_control(start, end, self._lr(task.round_idx))
            control_delta = torch.sub(control, previous, out=reused.empty(len(control), control.dtype, control.device))
        return ClientOutcome(
            client=task.client,
            num_rows=len(task.rows),
            weight=self.algorithm.client_weight(sum(row.weight for row in task.rows)),
            delta=torch.sub(end, start, out=reused.empty(len(end), end.dtype, end.device)),
            control=control,
            control_delta=control_delta,
            loss=stats.mean_loss,
            first_loss=stats.losses[0],
            num_tokens=stats.num_tokens,
            seconds=time.perf_counter() - began,
        )

    def _lr(self, round_idx: int) -> float:
        return cosine_by_round(round_idx, self.num_rounds, self.local.lr, self.local.lr_min)


@dataclass(frozen=True, eq=False)
class _Task:
    """A client's part in a round."""

    client: int
    rows: Sequence[TokenRow]
    round_idx: int
    state: ServerState
    client_control: torch.Tensor | None
    num_steps: int

    @cached_property
    def control(self) -> torch.Tensor | None:
        """c_i where the adapter is, copied there once."""
        return None if self.client_control is None else self.client_control.to(self.state.adapter.device)
