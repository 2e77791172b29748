"""Timing of calls that take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fedsim.study.bench_rows import Percentiles


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """p20, p50 and p80, with linear interpolation between neighbours."""
    assert seconds, "nothing was timed"
    p20, p50, p80 = np.percentile(np.asarray(seconds, dtype=np.float64), (20, 50, 80)).tolist()
    return Percentiles(p20, p50, p80)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms, which exact mode asks for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def launches(call: Callable[[], object], repeats: int, together: int = 20) -> list[float]:
    """Seconds of one call's kernels on CUDA, ``repeats`` times the mean of ``together`` calls between two events.

    A call takes less than a host needs to synchronise, so that a clock around it would time the host.
    """
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(together):
            call()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3 / together)
    return found


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 20,
    warmups: int = 2,
    budget_s: float = float("inf"),
    least: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each call, by name: all calls once, then all again, each time beginning with another one.

    Args:
        calls: what is timed; a call may be made any number of times.
        repeats: timed calls of each.
        warmups: calls of each that are made first and not counted.
        budget_s: no further repeat begins once the timed calls have taken so long together …
        least: … and each has been made so often.
    """
    for _ in range(warmups):
        for call in calls.values():
            seconds_of(call, device)
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        if turn >= least and sum(map(sum, found.values())) > budget_s:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(seconds_of(calls[name], device))
    return found
