"""Interface of a stage of the benchmark, and what it is given."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedsim.attention.choice import choose
from fedsim.base import keyed_random
from fedsim.config.lora import LoraSettings
from fedsim.fused.choice import fuse
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora
from fedsim.run.peak import Peak, device_peak
from fedsim.study.bench_rows import Correctness, Row
from tools.bench.models import ModelSize, build

PAPER_LORA = LoraSettings(r=32, alpha=64.0, dropout=0.0, targets=("q_proj", "v_proj"))


@dataclass(frozen=True)
class Bench:
    """Device, model and effort of a run of the benchmark.

    Attributes:
        device: where everything runs.
        size: the model that stages build.
        threads: torch's threads on a CPU.
        repeats: timed calls of each piece of work, where affordable.
        budget_s: what the timed calls of one stage may take together, roughly.
        say: shows a line of progress.
        wrong: parts of the stage whose check failed, which are not timed.
    """

    device: torch.device
    size: ModelSize
    threads: int
    repeats: int = 20
    budget_s: float = 60.0
    say: Callable[[str], None] = field(default=print)
    wrong: frozenset[str] = frozenset()

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def dtype_name(self) -> str:
        """``dtype`` as a row names it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def cuda(self) -> bool:
        """Return whether this is a GPU."""
        return self.device.type == "cuda"

    def base(self, attention: str | None = None) -> PreTrainedModel:
        """A new frozen base model, the same weights every time; peers get one of their own where they change it.

        Args:
            attention: transformers' name of an implementation, for a peer; None is fedsim's own: packed rows, by what
                ``auto`` takes here.
        """
        if attention is None:
            attention = choose("auto", self.size.llama(), self.dtype, self.device).implementation
        return build(self.size, self.dtype, self.device, attention)

    def adapted(self, lora: LoraSettings = PAPER_LORA, attention: str | None = None) -> tuple[PeftModel, FlatAdapter]:
        """A new base model with LoRA in a flat adapter, at :func:`start_vector`; ``attention`` as of :meth:`base`."""
        model = attach_lora(self.base(attention), lora)
        fuse(model)
        adapter = FlatAdapter(model)
        adapter.load(start_vector(adapter))
        return model, adapter

    def peak(self) -> Peak:
        """The device's peak in the model's dtype: a data sheet's figures for known GPUs, else measured once."""
        return device_peak(self.device, self.dtype, self.threads)


def start_vector(adapter: FlatAdapter) -> torch.Tensor:
    """Where training starts: A as PEFT starts it, B small but not zero, so that every gradient counts from step 1."""
    vector = adapter.initial(0)
    for slot in adapter.slots:
        if "lora_B" in slot.name:
            draws = keyed_random.generator(0, "lora_b", slot.name).normal(0.0, 0.02, size=slot.stop - slot.start)
            vector[slot.start : slot.stop] = torch.from_numpy(draws)
    return vector


class LeftOut(Exception):
    """Why a stage cannot be run here."""


class Stage(Protocol):
    """One stage: correctness first, timings after."""

    @property
    def name(self) -> str:
        """The stage's name, as its file is called."""
        ...

    def check(self, bench: Bench) -> list[Correctness]:
        """Compare with the reference, at a size that is quick; only what passes is timed.

        Raises:
            LeftOut: the stage cannot be run here.
        """
        ...

    def time(self, bench: Bench) -> Iterable[Row]:
        """Measure; rows may come as soon as they are there."""
        ...


def installed(library: str) -> bool:
    """Return whether a peer's library can be imported; stages leave out a peer without it."""
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # it is blocked, as by a test
        return False


@contextmanager
def memory_given_back(bench: Bench) -> Iterator[None]:
    """After the block, torch's cached GPU memory goes back to the device: a stage's models do not hinder the next."""
    try:
        yield
    finally:
        give_memory_back(bench.device)


def give_memory_back(device: torch.device) -> None:
    """Free what nobody refers to: models are part of reference cycles, which only the collector ends."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
