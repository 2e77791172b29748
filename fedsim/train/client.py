"""Local training of one client in one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch

from fedsim.base import reused
from fedsim.base.ranks import Lane
from fedsim.base.rounds import round_number
from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import Algorithm, ClientOutcome, Correction, ServerState
from fedsim.federation.participation import cosine_by_round, sample_rows
from fedsim.federation.scaffold import CONTROL
from fedsim.train.containment import RaiseErrors
from fedsim.train.loop import Trainer, TrainingPlan, TrainingStats
from fedsim.train.objectives import SftObjective

RAISE_ERRORS = RaiseErrors()


class ClientTrainer:
    """Local training of clients, one after the other, on this process's resident model.

    Args:
        trainer: model, flat adapter and optimizer.
        algorithm: the federated algorithm.
        objective: the loss of a step.
        local: the local-training configuration.
        num_steps: optimizer steps of a client that is no straggler in a round.
        num_rounds: length of the run, for the learning rate.
        seed: the run's seed.
        pass_tokens: most tokens of a pass outside exact mode; 0: ``micro_batch_size`` times
            ``max_length``.
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
        self,
        client: int,
        rows: Sequence[TokenRow],
        round_idx: int,
        num_steps: int | None = None,
    ) -> list[list[TokenRow]]:
        """Draw the rows of each local step; a straggler has the first ``num_steps`` of them."""
        size = self.local.batch_size
        if num_steps is None:
            num_steps = self.num_steps
        # Indices of the rows of all steps, drawn together.
        drawn = sample_rows(len(rows), num_steps * size, round_idx, client, self.seed)
        batches = []
        for start in range(0, len(drawn), size):
            batches.append([rows[i] for i in drawn[start : start + size]])
        return batches

    def num_tokens(
        self,
        client: int,
        rows: Sequence[TokenRow],
        round_idx: int,
        num_steps: int | None = None,
    ) -> int:
        """Count the tokens of a client's training in a round: its work, for the planner."""
        batches = self.batches(client, rows, round_idx, num_steps)
        return sum(map(len, chain.from_iterable(batches)))

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
        errors: RaiseErrors = RAISE_ERRORS,
    ) -> ClientOutcome:
        """Train from the global adapter with a new AdamW; the model keeps the client's adapter.

        Args:
            client: the client's id.
            rows: its tokenised rows.
            round_idx: the round.
            state: the server's state at the beginning of the round.
            client_control: the client's control variate, fp32 ``[size]``; None without one.
            lane: ranks that train the client together.
            on_step: called with (steps done, steps).
            num_steps: optimizer steps, where they are not :attr:`num_steps`.
            errors: error policy of this member's computations between the lane's sums; if it
                contains errors, all the lane's sums are joined before one is raised.

        Raises:
            NotFiniteError: a loss, gradient or the adapter was not finite.
            ClientError: ``errors`` has kept an error.
        """
        began = time.perf_counter()
        if num_steps is None:
            num_steps = self.num_steps
        task = _Task(client, rows, round_idx, state, client_control, num_steps)
        # 1. Put the global adapter into the model and draw the steps' rows.
        plan = errors.run(lambda: self._plan(task, errors))
        if plan is None:  # this member failed, but still joins the lane's sums
            plan = TrainingPlan([[]] * num_steps, lambda step: 0.0, ("failed",), errors=errors)
        # 2. Take the steps, with the lane's other members.
        stats = self.trainer.run(plan, self.objective, lane, on_step)
        # 3. Compute the update.
        outcome = errors.run(lambda: self._outcome(task, plan.correction, stats, began))
        errors.check()
        assert outcome is not None
        return outcome

    def _plan(self, task: _Task, errors: RaiseErrors) -> TrainingPlan[TokenRow]:
        """Load the global adapter into the model, and return the client's steps."""
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
            errors=errors,
        )

    def _outcome(
        self,
        task: _Task,
        correction: Correction,
        stats: TrainingStats,
        began: float,
    ) -> ClientOutcome:
        """Return the client's report after its last step."""
        start, end = task.state.adapter, self.trainer.adapter.values  # fp32 [size]

        # The new control variate and its change, c_i⁺ and c_i⁺ − c_i (SCAFFOLD).
        control = control_delta = None
        if self.algorithm.has_control:
            previous = task.control
            if previous is None:
                previous = torch.zeros_like(task.state.vectors[CONTROL])
            control = correction.next_control(start, end, self._lr(task.round_idx))
            out = reused.empty(len(control), control.dtype, control.device)
            control_delta = torch.sub(control, previous, out=out)

        out = reused.empty(len(end), end.dtype, end.device)
        return ClientOutcome(
            client=task.client,
            num_rows=len(task.rows),
            weight=self.algorithm.client_weight(sum(row.weight for row in task.rows)),
            delta=torch.sub(end, start, out=out),
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
    """Training of one client in one round."""

    client: int
    rows: Sequence[TokenRow]
    round_idx: int
    state: ServerState
    client_control: torch.Tensor | None
    num_steps: int

    @cached_property
    def control(self) -> torch.Tensor | None:
        """Control variate c_i on the adapter's device, copied there once; None without one."""
        if self.client_control is None:
            return None
        return self.client_control.to(self.state.adapter.device)
