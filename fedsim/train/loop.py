"""Training loop of clients' local steps, guard fine-tuning and CAI.

A batch is cut into micro-batches of nearly equal work, which are dealt to the members of a lane;
gradients and losses are summed over the lane, and every member takes the same optimizer step on the
flat adapter. Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from fedsim.base import keyed_random
from fedsim.base.errors import NotFiniteError
from fedsim.base.ranks import Lane, Term
from fedsim.federation.algorithms import Correction
from fedsim.federation.elementwise import all_finite
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.train.containment import RaiseErrors
from fedsim.train.dropout import KeyedDropout, Part
from fedsim.train.objectives import Objective

Item = TypeVar("Item")


@dataclass(frozen=True)
class StepSettings:
    """Settings of an optimizer step.

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
    """Steps of one call of :meth:`Trainer.run`.

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
        errors: error policy of this member's computations between the lane's sums.
    """

    batches: Sequence[Sequence[Item]]
    lr: Callable[[int], float]
    key: tuple[keyed_random.KeyPart, ...]
    correction: Correction = field(default_factory=Correction)
    what: str = "training"
    longest: int = 0
    pass_tokens: int = 0
    errors: RaiseErrors = field(default_factory=RaiseErrors)


@dataclass(frozen=True, eq=False)
class Pass(Generic[Item]):
    """Micro-batches of one forward and backward pass, by their numbers in the batch."""

    micro_batches: dict[int, Sequence[Item]]

    @property
    def items(self) -> list[Item]:
        """All items, in the micro-batches' order."""
        return list(chain.from_iterable(self.micro_batches.values()))


@dataclass(frozen=True)
class TrainingStats:
    """Losses and statistics of a run, the same on every member of the lane.

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
    """A resident model with its flat adapter and optimizer, whose state is reset for every run.

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
            plan: the steps.
            objective: the loss.
            lane: ranks that share each step.
            on_step: called with (steps done, steps) after each step.

        Raises:
            NotFiniteError: a loss or gradient was not finite.
            ClientError: ``plan.errors`` has kept an error: at once on a lane of one rank, else
                once all steps are done.
        """
        self._reset_optimizer()
        was_training = self.model.training
        self.model.train(objective.uses_dropout)
        rows = []  # of each step [gradient norm, loss, statistics…], on the device
        try:
            for step, batch in enumerate(plan.batches):
                rows.append(self._step(step, batch, plan, objective, lane))
                if lane.size == 1:  # no other member waits for this one's sums
                    plan.errors.check()
                if on_step is not None:
                    on_step(step + 1, len(plan.batches))
        finally:
            self.model.train(was_training)
        stats = plan.errors.run(lambda: self._stats(rows, plan, objective))
        plan.errors.check()
        assert stats is not None
        return stats

    def _stats(
        self,
        rows: list[torch.Tensor],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
    ) -> TrainingStats:
        """Check that the steps' results are finite, and return them.

        Args:
            rows: of each step fp64 [gradient norm, loss, statistics…].

        Raises:
            NotFiniteError: a result or the adapter is not finite.
        """
        table = torch.stack(rows).cpu()  # waits for the device; [steps, 2 + statistics]
        is_finite = torch.isfinite(table).all(dim=1)
        if not is_finite.all() or not all_finite(self.adapter.values):
            bad = [step for step, finite in enumerate(is_finite.tolist()) if not finite]
            first = bad[0] if bad else len(rows) - 1  # only the adapter, after the last step
            raise NotFiniteError(
                f"{plan.what}: the loss or gradient became NaN or infinite in step {first + 1} "
                f"of {len(rows)}; lower the learning rate, or clip with local.max_grad_norm"
            )
        losses, *columns = table[:, 1:].T.tolist()
        stats = dict(zip(objective.stat_names, columns, strict=True))
        num_tokens = 0
        for batch in plan.batches:
            num_tokens += sum(map(objective.num_tokens, batch))
        return TrainingStats(losses, stats, num_tokens)

    def _step(
        self,
        step: int,
        batch: Sequence[Item],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> torch.Tensor:
        """Take one optimizer step.

        Returns:
            fp64 [gradient norm, loss, statistics…] on the model's device; NaN if this member has
            failed.
        """
        sizes = [self.adapter.size, 1 + len(objective.stat_names)]
        # 1. Gradient and statistics of this member's micro-batches.
        terms = plan.errors.run(lambda: self._backward(step, batch, plan, objective, lane))
        gradients, stats, count = terms or self._no_terms(sizes)
        # 2. Their sums over the lane.
        total_grad, total_stats = lane.summer.sum([gradients, stats], sizes, count)
        # 3. The same AdamW step on every member.
        row = plan.errors.run(lambda: self._update(step, total_grad, total_stats, plan))
        if row is None:
            return self.adapter.values.new_full((1 + sizes[1],), torch.nan, dtype=torch.float64)
        return row

    def _no_terms(self, sizes: Sequence[int]) -> tuple[list[Term], list[Term], int]:
        """Return NaN terms for a failed member, which make every member's sum NaN."""
        gradient, stats = (self.adapter.values.new_full((size,), torch.nan) for size in sizes)
        return [Term(gradient)], [Term(stats.double())], 1

    def _update(
        self,
        step: int,
        total_grad: torch.Tensor,
        total_stats: torch.Tensor,
        plan: TrainingPlan[Item],
    ) -> torch.Tensor:
        """Take AdamW's step on the batch's gradient, the same on every member.

        Args:
            total_grad: ``[size]``, summed over the batch.
            total_stats: fp64 [loss, statistics…].

        Returns:
            See :meth:`_step`.
        """
        grad = self.adapter.grad
        grad.copy_(total_grad)
        plan.correction.on_loss_gradient(grad, self.adapter.values)
        # Clip by the norm of the batch's gradient; the norm stays on the device.
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
        """Compute the terms of this member's micro-batches.

        Exact mode has a term for each micro-batch, on any member; otherwise a member adds up its
        own gradients.

        Returns:
            Gradients ``[size]``, statistics fp64 [loss, statistics…], and the most terms that a
            segment has over the lane.
        """
        micro = self._micro_batches(batch, objective)
        normaliser = objective.normaliser(batch)
        grad, gradients, stats = self.adapter.grad, [], []
        grad.zero_()
        for number, part in enumerate(self._passes(micro, plan, objective, lane)):
            # Exact mode: each pass's gradient is a term of its own.
            if lane.summer.exact and number > 0:
                gradients.append(Term(grad.clone()))
                grad.zero_()
            self.draw(part, step, plan, objective)
            # Sums over the pass's items, by the whole batch's normaliser; gradients accumulate.
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
        """Prepare the dropout draws of a pass, which each micro-batch has by its own key."""
        if self._dropout is None or not objective.uses_dropout:
            return
        parts = []
        for number, items in part.micro_batches.items():
            seed = keyed_random.derive(self.settings.seed, "dropout", *plan.key, step, number)
            parts.append(Part(seed, objective.num_inputs(items), objective.num_targets(items)))
        self._dropout.begin(parts)

    def _passes(
        self,
        micro: Sequence[Sequence[Item]],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> list[Pass[Item]]:
        """Group this member's micro-batches into passes; in exact mode each has its own."""
        most = 0  # tokens of a pass; 0: one micro-batch
        if not lane.summer.exact:
            most = plan.pass_tokens or self.settings.micro_batch_size * plan.longest
        # Micro-batches are dealt to the members in turn; a pass is filled in their order.
        passes: list[dict[int, Sequence[Item]]] = []
        room = 0  # tokens that the last pass still takes
        for number in range(lane.index, len(micro), lane.size):
            size = sum(map(objective.num_tokens, micro[number]))
            if not passes or size > room:
                passes.append({})
                room = most
            passes[-1][number] = micro[number]
            room -= size
        return [Pass(part) for part in passes]

    def _micro_batches(self, batch: Sequence[Item], objective: Objective[Item]) -> list[list[Item]]:
        """Cut the batch into micro-batches of nearly equal work, the same for any lane."""
        sizes = [objective.num_tokens(item) for item in batch]
        micro = []
        for part in deal_rows(sizes, self.settings.micro_batch_size):
            micro.append([batch[i] for i in part])
        return micro

    def _reset_optimizer(self) -> None:
        """Set AdamW's moments and step count to zero, in place."""
        for value in self._optimizer.state.get(self._parameter, {}).values():
            value.zero_()


def deal_rows(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Deal rows to ⌈rows / most⌉ micro-batches of nearly equal work.

    The longest-processing-time rule (Graham 1969): heaviest row first, each to the lightest
    micro-batch that has room, ties by index. Packed rows need not be of similar length, but the
    members of a lane wait for the one that has most tokens.

    Args:
        sizes: tokens of each row.
        most: rows of a micro-batch.

    Returns:
        Indices of each micro-batch's rows; they depend on nothing but the arguments.
    """
    parts: list[list[int]] = [[] for _ in range(-(-len(sizes) // most))]
    loads = [0] * len(parts)  # tokens of each micro-batch
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        with_room = [i for i, part in enumerate(parts) if len(part) < most]
        lightest = min(with_room, key=lambda i: loads[i])
        parts[lightest].append(row)
        loads[lightest] += sizes[row]
    return parts
