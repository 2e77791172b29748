"""Measurement of a phase: counted at all 32 layers, or carried to them from 2 and 3, as layers repeat."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from fedsim.config.lora import LoraSettings
from tools.rehearsal.device import stand_in
from tools.rehearsal.phases import LAYERS, PHASES, Model, Phase, label, needed, steps
from tools.rehearsal.roofline import GPUS, Labels, Roofline

GIB: Final = 1 << 30


@dataclass(frozen=True)
class Measured:
    """Figures of a phase.

    Attributes:
        tokens: that go through the model; 0 where none do.
        kernels: operators that compute on the device.
        num_bytes: that they move.
        teraflops: of products, by kind.
        ms: roofline, by GPU.
        floor_ms: time that no program beats, by GPU.
        peak: bytes of live tensors at most.
        needed: bytes that ``memory_needs`` gives at 32 layers; None: no stage.
        num_waits: copies that the host waits for.
        waits: what they are.
        collective_bytes: handed to collectives, whose time is not counted.
        lost_ms: outside bf16 products and attention on the A100, by module.
        kernels_of: kernels by module.
    """

    tokens: int
    kernels: float
    num_bytes: float
    teraflops: Mapping[str, float]
    ms: Mapping[str, float]
    floor_ms: Mapping[str, float]
    peak: float
    needed: int | None
    num_waits: float
    waits: Sequence[str]
    collective_bytes: float
    lost_ms: Mapping[str, float]
    kernels_of: Mapping[str, float]


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """The fake GPU, on which all tensors inside are shapes alone."""
    device = stand_in()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield device


class Models:
    """Models of one number of layers, made when they are asked for."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.device = device
        self._made: dict[LoraSettings, tuple[Model, Labels]] = {}

    def of(self, lora: LoraSettings) -> tuple[Model, Labels]:
        """The model with this adapter, and the labels of its modules."""
        if lora not in self._made:
            model = Model(self.num_layers, lora, self.device)
            self._made[lora] = model, Labels(model.model, label)
        return self._made[lora]


def counted(phase: Phase, models: Models) -> Measured:
    """Run a phase and count it.

    Raises:
        Whatever a GPU would: tensors on two devices, dtypes that do not fit; and whatever needs a number from the
        device, which has none.
    """
    model, labels = models.of(phase.lora)
    roofline = Roofline(labels=labels)
    with roofline:
        roofline.hold(model.tensors())
        with steps(phase, model) as (work, run):
            roofline.restart()
            run()
    found = roofline.counted
    gc.collect()
    with unset_fake_temporarily():
        bound = needed(phase)
    return Measured(
        tokens=work.tokens,
        kernels=found.kernels,
        num_bytes=found.num_bytes,
        teraflops={kind: flops / 1e12 for kind, flops in found.flops.items()},
        ms={gpu: 1e3 * seconds for gpu, seconds in found.seconds.items()},
        floor_ms={gpu: 1e3 * rates.floor(work.flops, work.num_bytes) for gpu, rates in GPUS.items()},
        peak=found.peak,
        needed=bound,
        num_waits=len(found.waits),
        waits=found.waits,
        collective_bytes=sum(found.collectives.values()),
        lost_ms={name: 1e3 * seconds for name, seconds in found.lost.items()},
        kernels_of=dict(found.kernels_of),
    )


FEW: Final = (2, 3)
"""Layers of a quick rehearsal: with one alone, the last layer of guard scoring, which computes less, would be all."""


def carried(two: Measured, three: Measured, num_layers: int = LAYERS) -> Measured:
    """Figures at ``num_layers`` layers from those at :data:`FEW`: each further one adds what the third did."""

    def number(a: float, b: float) -> float:
        return a + (num_layers - FEW[0]) * (b - a)

    def table(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: number(a.get(name, 0.0), b.get(name, 0.0)) for name in b}

    changed: dict[str, Any] = {}
    for name, more in asdict(three).items():
        fewer = getattr(two, name)
        if name in ("tokens", "needed", "waits"):
            changed[name] = more
        else:
            changed[name] = table(fewer, more) if isinstance(more, dict) else number(fewer, more)
    return Measured(**changed)


def rehearse(
    names: Sequence[str], *, quick: bool, say: Callable[[str], None] = lambda name: None
) -> dict[str, Measured]:
    """Figures of phases at 32 layers: carried from :data:`FEW` layers if ``quick``, else of all layers."""
    found = {}
    with fake_device() as device:
        few, many = Models(FEW[0], device), Models(FEW[1] if quick else LAYERS, device)
        for name in names:
            phase = PHASES[name]
            say(name)
            if not phase.has_layers:
                found[name] = counted(phase, few)
            elif quick:
                found[name] = carried(counted(phase, few), counted(phase, many))
            else:
                found[name] = counted(phase, many)
    return found


def figures(measured: Measured) -> dict[str, float]:
    """What has a budget, rounded as it is committed."""
    values: dict[str, float] = {
        "kernels": round(measured.kernels),
        "waits": round(measured.num_waits),
        "gigabytes": round(measured.num_bytes / 1e9, 2),
        "peak_gib": round(measured.peak / GIB, 3),
    }
    if measured.tokens:
        values["megabytes_per_token"] = round(measured.num_bytes / 1e6 / measured.tokens, 2)
    return values | {f"{gpu.lower()}_ms": round(ms, 2) for gpu, ms in measured.ms.items()}


def top(table: Mapping[str, float], number: int = 4) -> list[tuple[str, float]]:
    """The largest entries."""
    return sorted(table.items(), key=lambda entry: -entry[1])[:number]
