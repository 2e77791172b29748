"""Seconds of each step of a training run, and what the run takes beyond its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from fedsim.study.bench_rows import Row
from tools.bench.measure import percentiles, synchronise
from tools.bench.stage import give_memory_back

NO_ROOM = "no room on the GPU"


@dataclass(frozen=True)
class StepTimes:
    """One or more runs of the same kind.

    Attributes:
        steps: seconds of every step but the first of each run.
        setups: of each run, seconds beyond its steps: making trainer and optimizer, preparing data, a slow first step.
    """

    steps: list[float]
    setups: list[float]

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(self.steps + other.steps, self.setups + other.setups)


def time_steps(run: Callable[[Callable[[], None]], object], device: torch.device, phases: int = 1) -> StepTimes:
    """Time a run that calls its argument after each step.

    On CUDA the marks are events on the stream, so that no step waits for the device.

    Args:
        phases: parts of the run with equally many steps; the i-th steps of all parts count as one.
    """
    marks: list[float | torch.cuda.Event] = []

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    synchronise(device)
    began = time.perf_counter()
    run(mark)
    synchronise(device)
    whole = time.perf_counter() - began
    num_steps = len(marks) // phases
    assert num_steps > 1 and len(marks) == num_steps * phases, "the first step of a phase is not counted: it needs two"
    parts = [marks[i : i + num_steps] for i in range(0, len(marks), num_steps)]
    seconds = [[_between(a, b) for a, b in pairwise(part)] for part in parts]
    steps = [sum(together) for together in zip(*seconds, strict=True)]
    return StepTimes(steps, [max(0.0, whole - num_steps * median(steps))])


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(second, float):
        return float(second) - float(first)  # type: ignore[arg-type]
    return first.elapsed_time(second) / 1e3


def runs_in_turns(
    runs: Mapping[str, Callable[[int, Callable[[], None]], object]],
    device: torch.device,
    turns: int,
    budget_s: float = float("inf"),
    phases: int = 1,
) -> dict[str, StepTimes]:
    """Each run once, then each again, beginning with another one each time; a run is given its turn and the mark.

    No further turn begins once all have taken ``budget_s`` together. A run that finds no room on the GPU is left out.
    """
    began = time.perf_counter()
    found = {name: StepTimes([], []) for name in runs}
    for turn in range(turns):
        if turn and time.perf_counter() - began > budget_s:
            break
        names = list(found)
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            full = False
            try:
                found[name] += time_steps(partial(runs[name], turn), device, phases)
            except torch.cuda.OutOfMemoryError:
                full = True
            if full:  # after the handler, whose traceback holds the run's tensors
                del found[name]
                give_memory_back(device)
    return found


def no_mark() -> None:
    """For a run whose steps are not timed."""


def step_row(
    stage: str,
    dtype: str,
    own: str,
    ours: StepTimes,
    rival: str,
    theirs: StepTimes | None,
    shapes: Mapping[str, object],
) -> Row:
    """A stage's row of steps beside a peer's; None: the peer is not there."""
    return Row(
        stage=stage,
        name=own,
        dtype=dtype,
        shapes=dict(shapes),
        seconds=percentiles(ours.steps),
        repeats=len(ours.steps),
        setup_s=median(ours.setups),
        peer=rival,
        peer_seconds=None if theirs is None else percentiles(theirs.steps),
        peer_setup_s=None if theirs is None else median(theirs.setups),
    )
