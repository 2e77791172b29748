"""One client's local training in one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import Algorithm, ServerState
from fedsim.federation.outcome import ClientOutcome
from fedsim.federation.sampling import cosine_by_round, sample_rows
from fedsim.federation.scaffold import CONTROL
from fedsim.ranks import Lane
from fedsim.train.loop import Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective


class ClientTrainer:
    """Trains clients, one after the other, on this process's resident model.

    Args:
        trainer: model, flat adapter and optimizer.
        algorithm: the federated algorithm.
        local: the local-training configuration.
        num_steps: optimizer steps of a client in a round.
        num_rounds: length of the run, for the learning rate.
        seed: the run's seed.
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
    ) -> None:
        self.trainer = trainer
        self.algorithm = algorithm
        self.objective = objective
        self.local = local
        self.num_steps = num_steps
        self.num_rounds = num_rounds
        self.seed = seed

    def batches(self, client: int, rows: Sequence[TokenRow], round_idx: int) -> list[list[TokenRow]]:
        """The rows of each local step."""
        size = self.local.batch_size
        drawn = sample_rows(len(rows), self.num_steps * size, round_idx, client, self.seed)
        return [[rows[i] for i in drawn[start : start + size]] for start in range(0, len(drawn), size)]

    def num_tokens(self, client: int, rows: Sequence[TokenRow], round_idx: int) -> int:
        """Tokens that the client will train on in a round: its work, for the planner."""
        return sum(len(row) for batch in self.batches(client, rows, round_idx) for row in batch)

    def train(
        self,
        client: int,
        rows: Sequence[TokenRow],
        round_idx: int,
        state: ServerState,
        client_control: torch.Tensor | None,
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
    ) -> ClientOutcome:
        """Train from the global adapter with a new AdamW; the model is left holding the client's adapter."""
        began = time.perf_counter()
        lr = cosine_by_round(round_idx, self.num_rounds, self.local.lr, self.local.lr_min)
        adapter = self.trainer.adapter
        adapter.load(state.adapter)
        if client_control is not None:
            client_control = client_control.to(adapter.values.device)
        correction = self.algorithm.correction(state, client_control)
        plan = TrainingPlan(
            batches=self.batches(client, rows, round_idx),
            lr=lambda step: lr,
            key=("local", round_idx, client),
            what=f"client {client}, round {round_idx + 1}",
            correction=correction,
            longest=self.local.max_length,
        )
        stats = self.trainer.run(plan, self.objective, lane, on_step)
        control = control_delta = None
        if self.algorithm.has_control:
            known = state.vectors[CONTROL]
            previous = torch.zeros_like(known) if client_control is None else client_control
            control = correction.next_control(state.adapter, adapter.values, lr)
            control_delta = control - previous
        return ClientOutcome(
            client=client,
            num_rows=len(rows),
            weight=self.algorithm.client_weight(sum(row.weight for row in rows)),
            delta=adapter.values - state.adapter,
            control=control,
            control_delta=control_delta,
            loss=stats.mean_loss,
            first_loss=stats.losses[0],
            num_tokens=stats.num_tokens,
            seconds=time.perf_counter() - began,
        )
