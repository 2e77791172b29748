"""The one training loop: local steps of clients, guard fine-tuning and CAI all run here.

A batch is cut into micro-batches of nearly equal work, which are dealt to the members of a lane;
gradients and losses are summed over the lane, and every member takes the same optimizer step on the
flat adapter. Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from fedsim.base import keyed_random
from fedsim.base.errors import NotFiniteError
from fedsim.base.ranks import Lane, Term
from fedsim.federation.algorithms import Correction
from fedsim.federation.elementwise import all_finite
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.train.containment import OwnWork
from fedsim.train.dropout import KeyedDropout, Part
from fedsim.train.objectives import Objective

Item = TypeVar("Item")


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken.

    Attributes:
        micro_batch_size: rows of one forward and backward pass.
        max_grad_norm: clip the batch gradient to this norm; 0 does not clip.
        weight_decay: AdamW's.
        seed: the run's seed, for dropout.
    """

    micro_batch_size: int
    max_grad_norm: float
    weight_decay: float
    seed: int


@dataclass(frozen=True, eq=False)
class TrainingPlan(Generic[Item]):
    """What one call of :meth:`Trainer.run` trains on.

    Attributes:
        batches: the items of each step.
        lr: learning rate of step t.
        key: names the dropout draws, such as ("local", round_idx, client).
        correction: the federated algorithm's part in a step.
        what: names the training in an error, such as "client 3, round 1".
        longest: tokens of the longest item that may come, as the objective counts them. Outside
            exact mode, micro-batches share a pass while they are no more than ``micro_batch_size``
            times that. 0: each has a pass of its own.
        pass_tokens: most tokens of a pass instead of that, where memory decides; 0: ``longest``
            does.
        own: runs what this member computes apart from the lane's sums.
    """

    batches: Sequence[Sequence[Item]]
    lr: Callable[[int], float]
    key: tuple[keyed_random.KeyPart, ...]
    correction: Correction = field(default_factory=Correction)
    what: str = "training"
    longest: int = 0
    pass_tokens: int = 0
    own: OwnWork = field(default_factory=OwnWork)


@dataclass(frozen=True, eq=False)
class Pass(Generic[Item]):
    """What goes through the model at once: one micro-batch or several, by their numbers in the
    batch.
    """

    micro_batches: dict[int, Sequence[Item]]

    @property
    def items(self) -> list[Item]:
        """All items, in the micro-batches' order."""
        return [item for items in self.micro_batches.values() for item in items]


@dataclass(frozen=True)
class TrainingStats:
    """What came out of a run, the same on every member of the lane.

    Attributes:
        losses: mean loss of each step.
        stats: other means of each step, by name.
        num_tokens: tokens put through the model, over all members.
    """

    losses: list[float]
    stats: dict[str, list[float]]
    num_tokens: int

    @property
    def mean_loss(self) -> float:
        """Mean of the steps' losses."""
        return sum(self.losses) / len(self.losses)

    def mean(self, name: str) -> float:
        """Mean of a statistic over the steps."""
        return sum(self.stats[name]) / len(self.stats[name])


class Trainer:
    """A resident model with its flat adapter and optimizer; the optimizer state starts at zero in
    every run.

    Args:
        model: the base model with LoRA layers inside.
        adapter: its flat adapter.
        settings: how steps are taken.

    Raises:
        ModelError: LoRA's dropout cannot be drawn for one of its layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: FlatAdapter,
        settings: StepSettings,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.settings = settings
        self._parameter = torch.nn.Parameter(adapter.values)
        self._dropout = KeyedDropout.install(model)
        self._optimizer = torch.optim.AdamW(
            [self._parameter],
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def run(
        self,
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainingStats:
        """Train from the adapter's present values, in place.

        Args:
            on_step: called with (steps done, steps) after each step.

        Raises:
            NotFiniteError: a loss or gradient was not finite.
            ClientError: ``plan.own`` has kept an error: at once on a lane of one rank, else once
                all steps are done.
        """
        self._reset_optimizer()
        was_training = self.model.training
        self.model.train(objective.uses_dropout)
        rows = []
        try:
            for step, batch in enumerate(plan.batches):
                rows.append(self._step(step, batch, plan, objective, lane))
                if lane.size == 1:
                    plan.own.check()
                if on_step is not None:
                    on_step(step + 1, len(plan.batches))
        finally:
            self.model.train(was_training)
        stats = plan.own.do(lambda: self._stats(rows, plan, objective))
        plan.own.check()
        assert stats is not None
        return stats

    def _stats(
        self,
        rows: list[torch.Tensor],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
    ) -> TrainingStats:
        """What the steps gave, once it is known to be finite."""
        table = torch.stack(rows).cpu()
        if not torch.isfinite(table).all() or not all_finite(self.adapter.values):
            bad = next(
                (i for i, row in enumerate(table) if not torch.isfinite(row).all()),
                len(rows) - 1,
            )
            raise NotFiniteError(
                f"{plan.what}: the loss or gradient became NaN or infinite in step {bad + 1} of {len(rows)}; "
                "lower the learning rate, or clip with local.max_grad_norm",
            )
        columns = table[:, 1:].T.tolist()
        tokens = sum(objective.num_tokens(item) for batch in plan.batches for item in batch)
        return TrainingStats(
            columns[0],
            dict(zip(objective.stat_names, columns[1:], strict=True)),
            tokens,
        )

    def _step(
        self,
        step: int,
        batch: Sequence[Item],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> torch.Tensor:
        """One optimizer step; returns [gradient norm, loss, statistics…] in fp64 on the model's
        device.
        """
        sizes = [self.adapter.size, 1 + len(objective.stat_names)]
        terms = plan.own.do(lambda: self._backward(step, batch, plan, objective, lane))
        gradients, stats, count = terms or self._no_terms(sizes)
        total_grad, total_stats = lane.summer.sum([gradients, stats], sizes, count)
        row = plan.own.do(lambda: self._update(step, total_grad, total_stats, plan))
        return (
            self.adapter.values.new_full((1 + sizes[1],), torch.nan, dtype=torch.float64)
            if row is None
            else row
        )

    def _no_terms(self, sizes: Sequence[int]) -> tuple[list[Term], list[Term], int]:
        """NaN in the place of what this member cannot compute, so that no member takes the sum for
        a result.
        """
        gradient, stats = (self.adapter.values.new_full((size,), torch.nan) for size in sizes)
        return [Term(gradient)], [Term(stats.double())], 1

    def _update(
        self,
        step: int,
        total_grad: torch.Tensor,
        total_stats: torch.Tensor,
        plan: TrainingPlan[Item],
    ) -> torch.Tensor:
        """The optimizer's step on the batch's gradient, alike on every member; returns what
        :meth:`_step` does.
        """
        grad = self.adapter.grad
        grad.copy_(total_grad)
        plan.correction.on_loss_gradient(grad, self.adapter.values)
        norm = torch.linalg.vector_norm(grad)
        if self.settings.max_grad_norm > 0:
            grad.mul_((self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        plan.correction.on_gradient(grad)
        lr = plan.lr(step)
        self._optimizer.param_groups[0]["lr"] = lr
        self._parameter.grad = grad
        self._optimizer.step()
        plan.correction.on_values(self.adapter.values, lr)
        return torch.cat([norm.double()[None], total_stats.to(norm.device, non_blocking=True)])

    def _backward(
        self,
        step: int,
        batch: Sequence[Item],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> tuple[list[Term], list[Term], int]:
        """Gradient and statistics of this member's part, and the most terms of a segment over the
        lane.

        Exact mode has a term for each micro-batch, whoever computes it; else a member adds up its
        own.
        """
        micro = self._micro_batches(batch, objective)
        normaliser = objective.normaliser(batch)
        grad, gradients, stats = self.adapter.grad, [], []
        grad.zero_()
        for number, part in enumerate(self._passes(micro, plan, objective, lane)):
            if lane.summer.exact and number > 0:
                gradients.append(Term(grad.clone()))
                grad.zero_()
            self.draw(part, step, plan, objective)
            loss, sums = objective.sums(self.model, part.items)
            (loss / normaliser).backward()
            stats.append(Term(torch.cat([loss.detach()[None], sums]).double() / normaliser))
        if stats:
            gradients.append(Term(grad))
        return gradients, stats, max(1, len(micro))

    def draw(
        self,
        part: Pass[Item],
        step: int,
        plan: TrainingPlan[Item],
        objective: Objective[Item],
    ) -> None:
        """Make ready the dropout draws of a pass: each micro-batch has its own, whatever shares the
        pass with it.
        """
        if self._dropout is not None and objective.uses_dropout:
            self._dropout.begin(
                Part(
                    keyed_random.derive(self.settings.seed, "dropout", *plan.key, step, number),
                    objective.num_inputs(items),
                    objective.num_targets(items),
                )
                for number, items in part.micro_batches.items()
            )

    def _passes(
        self,
        micro: Sequence[Sequence[Item]],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> list[Pass[Item]]:
        """This member's micro-batches, one a pass in exact mode, else as many together as the plan
        allows.
        """
        most = (
            0
            if lane.summer.exact
            else plan.pass_tokens or self.settings.micro_batch_size * plan.longest
        )
        passes: list[dict[int, Sequence[Item]]] = []
        room = 0
        for number in range(lane.index, len(micro), lane.size):
            size = sum(map(objective.num_tokens, micro[number]))
            if not passes or size > room:
                passes.append({})
                room = most
            passes[-1][number] = micro[number]
            room -= size
        return [Pass(part) for part in passes]

    def _micro_batches(self, batch: Sequence[Item], objective: Objective[Item]) -> list[list[Item]]:
        """The batch in parts of nearly equal work, whatever the lane: draws and values belong to
        them.
        """
        sizes = [objective.num_tokens(item) for item in batch]
        return [
            [batch[i] for i in part] for part in deal_rows(sizes, self.settings.micro_batch_size)
        ]

    def _reset_optimizer(self) -> None:
        for value in self._optimizer.state.get(self._parameter, {}).values():
            value.zero_()


def deal_rows(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Deal rows to ⌈rows / most⌉ micro-batches: heaviest first, each to the lightest that has room,
    ties by index.

    The longest-processing-time rule (Graham 1969): packed rows need not be of similar length, but
    the members of a lane wait for the one that has most tokens.

    Args:
        sizes: tokens of each row.
        most: rows of a micro-batch.

    Returns:
        Indices of each micro-batch's rows; a function of the arguments alone.
    """
    parts: list[list[int]] = [[] for _ in range(-(-len(sizes) // most))]
    loads = [0] * len(parts)
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = min(
            (i for i, part in enumerate(parts) if len(part) < most),
            key=lambda i: loads[i],
        )
        parts[lightest].append(row)
        loads[lightest] += sizes[row]
    return parts
