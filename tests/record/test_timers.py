"""Phase timers: seconds by name, nested under their parents, also when a phase fails."""

from __future__ import annotations

import pytest
import torch

from fedsim.record.timers import PhaseTimers, top_level_seconds


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_accumulate_until_they_are_popped() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    for seconds in (1.0, 2.5):
        with timers.phase("train"):
            clock.now += seconds
        clock.now += 50.0  # between phases: charged to nobody
    assert timers.pop() == {"time/train_s": 3.5}
    assert timers.pop() == {}


def test_a_nested_phase_is_part_of_its_parent() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with timers.phase("cai"):
        clock.now += 1.0
        with timers.phase("sft"):
            clock.now += 2.0
        with timers.phase("dpo"):
            clock.now += 4.0
    with timers.phase("sft"):
        clock.now += 8.0
    seconds = timers.pop()
    assert seconds == {"time/cai_s": 7.0, "time/cai/sft_s": 2.0, "time/cai/dpo_s": 4.0, "time/sft_s": 8.0}
    assert top_level_seconds({"round": 0, "client/loss": 1.0, **seconds}) == {"cai": 7.0, "sft": 8.0}


def test_a_failed_phase_is_charged_and_closed() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with pytest.raises(KeyError), timers.phase("train"):
        clock.now += 3.0
        raise KeyError
    assert timers.pop() == {"time/train_s": 3.0}


def test_an_open_phase_cannot_be_popped() -> None:
    timers = PhaseTimers()
    with timers.phase("train"), pytest.raises(AssertionError, match="train"):
        timers.pop()


@pytest.mark.parametrize("name", ["", "a/b", "two words"])
def test_a_phase_name_is_a_word(name: str) -> None:
    with pytest.raises(AssertionError), PhaseTimers().phase(name):
        pass


def test_synchronize_waits_for_the_gpu_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(None))
    with PhaseTimers(synchronize=True).phase("train"):
        assert len(waits) == 1
    assert len(waits) == 2


def test_a_phase_is_a_range_in_a_trace() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        timers = PhaseTimers()
        with timers.phase("cai"), timers.phase("dpo"):
            torch.ones(3).sum()
    names = {event.key for event in profiler.key_averages()}
    assert {"phase: cai", "phase: cai/dpo", "aten::sum"} <= names
