"""Training under DeepSpeed's ZeRO-2: :class:`Trainer` with DeepSpeed's reduction and optimizer.

Every rank holds the whole model and takes its share of each batch's micro-batches; ZeRO-2 splits
gradients and AdamW's state over the ranks (arXiv 1910.02054). DeepSpeed gets one parameter, the
flat adapter in fp32: it would change the dtype and device of the frozen base if it got the model.
Sums are DeepSpeed's, so results agree with the plain loop only up to rounding, and depend on the
number of ranks to the same degree.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from fedsim.base.errors import ConfigError
from fedsim.base.ranks import Lane, Term
from fedsim.federation.algorithms import Correction
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.parallel.sums import Summer
from fedsim.train.containment import RaiseErrors
from fedsim.train.loop import Item, Pass, StepSettings, Trainer, TrainingPlan, TrainingStats
from fedsim.train.objectives import Objective
from fedsim.train.zero_config import import_deepspeed


class ZeroTrainer(Trainer):
    """A :class:`Trainer` whose steps DeepSpeed takes; its lane must be all ranks.

    Args:
        model: the base model with LoRA layers inside.
        adapter: its flat adapter; it follows DeepSpeed's copy after every step.
        settings: how steps are taken.
        config: DeepSpeed's, as :func:`fedsim.train.zero_config.zero_settings` gives it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: FlatAdapter,
        settings: StepSettings,
        config: dict[str, Any],
    ) -> None:
        super().__init__(model, adapter, settings)
        assert config["gradient_clipping"] == settings.max_grad_norm
        assert config["optimizer"]["params"]["weight_decay"] == settings.weight_decay
        self.config = config
        self._engine: Any = None

    def run(
        self,
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainingStats:
        """Train as :meth:`Trainer.run` does, with DeepSpeed's optimizer.

        Raises:
            ConfigError: DeepSpeed refuses its settings.
            NotFiniteError: a loss or gradient was not finite.
        """
        assert type(plan.correction) is Correction, "federated corrections have no place here"
        assert type(plan.errors) is RaiseErrors, "errors end the run here: there are no clients"
        # A new engine for each run: the optimizer's state starts at zero.
        replica = _Replica(self.model, self.adapter, objective)
        with _deepspeed_engine(replica, self.config, lane) as self._engine:
            return super().run(plan, objective, lane, on_step)

    def _step(
        self,
        step: int,
        batch: Sequence[Item],
        plan: TrainingPlan[Item],
        objective: Objective[Item],
        lane: Lane,
    ) -> torch.Tensor:
        """Take one optimizer step.

        Every rank makes as many passes as the busiest one, since each pass may hold a reduction; a
        rank that has no micro-batch left adds a gradient of zero.

        Returns:
            fp64 [gradient norm, loss, statistics…] on the model's device.
        """
        engine = self._engine
        micro = self._micro_batches(batch, objective)
        normaliser = objective.normaliser(batch)
        num_passes = max(1, math.ceil(len(micro) / lane.size))
        num_sums, device = 1 + len(objective.stat_names), self.adapter.values.device
        sums = torch.zeros(num_sums, dtype=torch.float64, device=device)  # [loss, statistics…]

        # Forward and backward passes; the last one ends DeepSpeed's accumulation of gradients.
        for number in range(num_passes):
            index = number * lane.size + lane.index
            items = None  # this rank has no micro-batch left
            if index < len(micro):
                part = Pass({index: micro[index]})
                self.draw(part, step, plan, objective)
                items = part.items
            engine.set_gradient_accumulation_boundary(number == num_passes - 1)
            loss, stats = engine(items)
            # DeepSpeed takes the mean over ranks; the batch's gradient is the sum.
            engine.backward(loss * (lane.size / normaliser), scale_wrt_gas=False)
            sums += torch.cat([loss.detach().double()[None], stats.double()]) / normaliser

        # AdamW's step, the same on every rank; then the adapter, losses and norm.
        for group in engine.optimizer.param_groups:
            group["lr"] = plan.lr(step)
        engine.step()
        self.adapter.load(engine.module.vector.detach())
        self._count(num_passes, lane)
        (total,) = lane.summer.sum([[Term(sums)]], [sums.numel()], lane.size)
        norm = engine.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float64, device=sums.device)
        return torch.cat([norm[None], total.to(sums.device)])

    def _count(self, num_passes: int, lane: Lane) -> None:
        """Count the bytes that DeepSpeed sends in a step.

        They are the fp32 gradient in every pass, and a rank's share of the new adapter.
        """
        assert isinstance(lane.summer, Summer)
        if lane.size > 1:
            share = -(-self.adapter.size // lane.size)
            lane.summer.traffic.num_bytes += 4 * (num_passes * self.adapter.size + share)


class _Replica(nn.Module):
    """DeepSpeed's module: one parameter, and the summed loss of a micro-batch as its function."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: FlatAdapter,
        objective: Objective[Any],
    ) -> None:
        super().__init__()
        self.vector = nn.Parameter(adapter.copy())
        prefix = "base_model.model."
        self._names = [slot.name.removeprefix(prefix) for slot in adapter.slots]
        self._shapes = [slot.shape for slot in adapter.slots]
        self._num_stats = len(objective.stat_names)
        # In a tuple: DeepSpeed would move and send a submodule.
        self._hidden = (_Sums(model, objective),)
        known = {name for name, _ in model.named_parameters()}
        assert set(self._names) <= known, "the adapter belongs to another model"

    def forward(self, items: Sequence[Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum loss and statistics of ``items``; for None return zeros with a gradient of zero."""
        if items is None:
            return self.vector.sum() * 0.0, self.vector.new_zeros(self._num_stats)
        # Views of the flat vector as the adapter's tensors, by their names in the hidden module.
        parts = self.vector.split([math.prod(shape) for shape in self._shapes])
        values = {}
        for name, part, shape in zip(self._names, parts, self._shapes, strict=True):
            values[f"model.{name}"] = part.view(shape)
        loss, stats = torch.func.functional_call(self._hidden[0], values, (items,))
        return loss, stats


class _Sums(nn.Module):
    """An objective as a module, so that a call can use other adapter values."""

    def __init__(self, model: nn.Module, objective: Objective[Any]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, items: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.objective.sums(self.model, items)


@contextmanager
def _deepspeed_engine(replica: _Replica, config: dict[str, Any], lane: Lane) -> Iterator[Any]:
    """Open DeepSpeed's engine over all ranks; at the end DeepSpeed's global state is reset."""
    device = replica.vector.device
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed requires it
    deepspeed = import_deepspeed(device.type)
    # A shared-memory reduction for inference on CPU, compiled on the spot; ZeRO does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _process_group(lane, device):
        try:
            engine, *_ = deepspeed.initialize(
                model=replica,
                model_parameters=[replica.vector],
                config=dict(config),
            )
        except (ValueError, AssertionError) as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"guard.deepspeed: DeepSpeed refuses it: {text}") from error
        try:
            with warnings.catch_warnings():
                # DeepSpeed calls a collective by a name that torch has deprecated.
                name = ".*all_gather_into_tensor"
                warnings.filterwarnings("ignore", message=name, category=FutureWarning)
                yield engine
        finally:
            # DeepSpeed keeps global references that destroy() leaves behind.
            engine.destroy()
            deepspeed.utils.groups._release_process_group_references()
            deepspeed.comm.comm.cdb = None


@contextmanager
def _process_group(lane: Lane, device: torch.device) -> Iterator[None]:
    """Use the run's process group, or one of a single process where there is none."""
    if dist.is_initialized():
        assert lane.size == dist.get_world_size(), "ZeRO takes all ranks"
        yield
        return
    assert lane.size == 1
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
