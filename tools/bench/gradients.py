"""Gradients of one batch in half precision, ours and a padded loop's, each against the same weights in fp32.

In bf16 two right computations differ by more than rounding of the last place, and AdamW's first steps turn small
differences of a gradient into whole steps. What is asked is that ours is no further from fp32 than a plain loop in the
same dtype, give or take half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fedsim.base.ranks import Lane
from fedsim.federation.algorithms import Correction
from fedsim.study.bench_rows import Correctness
from fedsim.train.loop import Trainer, TrainingPlan
from fedsim.train.objectives import Objective
from tools.bench.plain_loop import PeerModel
from tools.bench.stage import Bench

Item = TypeVar("Item")
SLACK = 1.5


class SeenGradient(Correction):
    """Keeps the gradient that the loss gave, before clipping."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None

    def on_loss_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> None:
        """Copy it."""
        self.gradient = grad.clone()


def of_trainer(trainer: Trainer, batch: Sequence[Item], objective: Objective[Item], lane: Lane) -> torch.Tensor:
    """Gradient of a batch at the adapter's present values, which stay as they are."""
    seen = SeenGradient()
    plan = TrainingPlan([batch], lambda step: 0.0, ("gradient",), correction=seen)
    trainer.run(plan, objective, lane)
    assert seen.gradient is not None
    return seen.gradient


def of_loss(peer: PeerModel, loss: Callable[[PeerModel], torch.Tensor]) -> torch.Tensor:
    """Gradient of a peer's loss in the flat vector's order."""
    peer.model.train()
    for parameter in peer.trainable():
        parameter.grad = None
    loss(peer).backward()
    found = torch.cat([_grad(parameter).flatten() for parameter in peer.trainable()])
    for parameter in peer.trainable():
        parameter.grad = None
    return found


def against_fp32(
    bench: Bench,
    make: Callable[[], PeerModel],
    start: torch.Tensor,
    ours: torch.Tensor,
    loss: Callable[[PeerModel], torch.Tensor],
    what: str,
) -> Correctness:
    """How far ours is from fp32, as a multiple of how far the plain loop is.

    Args:
        make: a new peer in the benchmark's dtype; its twin in fp32 has the same weights.
        start: the adapter at which the gradients are taken.
        ours: fedsim's gradient.
    """
    peer = make()
    peer.load(start)
    plain = of_loss(peer, loss)
    peer.model.float()
    reference = of_loss(peer, loss)
    mine, theirs = (float((grad - reference).norm() / reference.norm()) for grad in (ours, plain))
    return Correctness(
        f"gradient of {what}: ‖ours − fp32‖ ({mine:.2g} of ‖fp32‖) over the plain {bench.dtype_name} loop's",
        mine / theirs,
        SLACK,
    )


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "every LoRA matrix takes part"
    return parameter.grad
