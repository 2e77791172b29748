"""Seeded faults, each of which a rehearsal must report: by an exception, a copy that waits, or a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from fedsim.attention import spans
from fedsim.train import dropout
from fedsim.train.loop import Trainer
from tools.rehearsal.budgets import exceeded
from tools.rehearsal.measure import Models, counted, fake_device, figures
from tools.rehearsal.phases import LORA, PHASES, Model

PHASE: Final = "SFT step"


@dataclass(frozen=True)
class Report:
    """What a rehearsal says of a step.

    Attributes:
        error: the exception's type and first line; "" if there was none.
        waits: copies that the host waits for.
        exceeded: figures above those of the step without the fault.
    """

    error: str = ""
    waits: tuple[str, ...] = ()
    exceeded: tuple[str, ...] = ()


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _draws_on_the_host(model: Model) -> Any:
    return _replaced(dropout, "to_device", lambda tensor, device: tensor)


def _positions_on_the_host(model: Model) -> Any:
    return _replaced(spans.Spans, "positions", property(lambda self: torch.arange(self.num_queries)[None]))


def _pageable_copy(model: Model) -> Any:
    return _replaced(spans, "to_device", lambda tensor, device: tensor.to(device))


def _after_update(act: Callable[[Trainer, torch.Tensor], object]) -> Any:
    real = Trainer._update

    def update(self: Trainer, *args: Any) -> torch.Tensor:
        row = real(self, *args)
        act(self, row)
        return row

    return _replaced(Trainer, "_update", update)


def _item(model: Model) -> Any:
    return _after_update(lambda trainer, row: row[0].item())


def _if_norm(model: Model) -> Any:
    real = torch.linalg.vector_norm

    def norm(grad: torch.Tensor) -> torch.Tensor:
        found = real(grad)
        return found if found > 1 else found * 2

    return _replaced(torch.linalg, "vector_norm", norm)


def _result_to_the_host(model: Model) -> Any:
    return _after_update(lambda trainer, row: row.cpu())


def _one_more_kernel(model: Model) -> Any:
    return _after_update(lambda trainer, row: trainer.adapter.grad.mul(1.0))


@contextmanager
def _hooked(model: Model, hook: Callable[..., None]) -> Iterator[None]:
    handle = model.inner.get_submodule("model.layers.0.mlp").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _one_more_fp32_copy(model: Model) -> Any:
    def copy(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        args[0].float()

    return _hooked(model, copy)


def _kept_activation(model: Model) -> Any:
    kept: list[torch.Tensor] = []
    return _hooked(model, lambda module, args, out: kept.append(out.repeat(1, 64, 1)))


FAULTS: Final[Mapping[str, Callable[[Model], Any]]] = {
    "dropout's counters on the host": _draws_on_the_host,
    "positions on the host": _positions_on_the_host,
    ".item() in a step": _item,
    "if norm > 1": _if_norm,
    "pageable copy of the batch": _pageable_copy,
    "result read in a step": _result_to_the_host,
    "one more kernel": _one_more_kernel,
    "one more fp32 copy": _one_more_fp32_copy,
    "an activation that is kept": _kept_activation,
}


def reports() -> dict[str, Report]:
    """What is reported of each fault in an SFT step of one layer, and under "" of the step without one."""
    with fake_device() as device:
        models = Models(1, device)
        phase = PHASES[PHASE]
        clean = figures(counted(phase, models))
        found = {"": _report(lambda: counted(phase, models), clean)}
        for name, fault in FAULTS.items():
            with fault(models.of(LORA)[0]):
                found[name] = _report(lambda: counted(phase, models), clean)
    return found


def _report(run: Callable[[], Any], clean: Mapping[str, float]) -> Report:
    try:
        measured = run()
    except Exception as error:
        return Report(error=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return Report(waits=tuple(measured.waits), exceeded=tuple(exceeded(PHASE, figures(measured), clean)))
