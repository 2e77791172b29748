"""Full memory as one line with the stage's keys and, on a GPU, who else holds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.errors import MemoryFullError, RunError
from fedsim.base.journal import Journal
from fedsim.base.launching import line_of
from fedsim.base.out_of_memory import STAGE_KEYS, explained, explaining_memory, is_out_of_memory
from fedsim.config import describe
from fedsim.parallel.exits import to_picklable

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of …")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU of 80 GiB of which this process holds 20: change what is free."""
    found = {"free": 60 * GIB}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GIB)
    return found


@pytest.mark.parametrize(
    ("error", "is_full"),
    [(FULL, True), (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
     (RuntimeError("CUDA out of memory in a library"), True), (RuntimeError("a bug"), False), (ValueError("x"), False),
     (ValueError("can't allocate memory"), False)],
)  # fmt: skip
def test_what_counts_as_full_memory(error: Exception, is_full: bool) -> None:
    assert is_out_of_memory(error) is is_full


@pytest.mark.parametrize("stage", STAGE_KEYS)
def test_the_keys_of_the_stage_are_named(gpu: dict[str, int], stage: str) -> None:
    text = str(explained(FULL, f"{stage} and so on"))
    assert f"lower {' or '.join(STAGE_KEYS[stage])}" in text and "\n" not in text
    assert "GPU 2 is full: 20.00 GiB of 80.00 GiB are this process's" in text and "Tried to allocate 2.00 GiB" in text


@pytest.mark.parametrize(("free_gib", "is_busy"), [(60, False), (57, False), (55, True), (0, True)])
def test_other_processes_on_the_gpu_are_named(gpu: dict[str, int], free_gib: int, is_busy: bool) -> None:
    """From 5 % of the GPU on; less is CUDA's own context."""
    gpu["free"] = free_gib * GIB
    text = str(explained(FULL, "local training"))
    assert ("CUDA_VISIBLE_DEVICES" in text) is is_busy
    assert (f"{60 - free_gib}.00 GiB others'" in text) is is_busy


def test_a_gpu_that_answers_no_more_still_gets_advice(gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert "GPU 2 is full (" in str(explained(FULL, "local training"))


def test_stages_and_keys_are_those_of_the_program() -> None:
    """A stage that is renamed, or a key, would leave advice that nobody gets."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fedsim").rglob("*.py"))
    kinds = re.findall(r'store\.get\(\s*"([a-z-]+)"', source)
    stages = re.findall(r'phase\(\s*f?"([^"]+)"', source) + [f"making {kind}" for kind in kinds]
    known = {info.name for info in describe()}
    for stage, keys in STAGE_KEYS.items():
        assert any(name.startswith(stage) for name in stages), stage
        assert set(keys) <= known


def test_the_error_has_its_place_and_travels() -> None:
    journal = Journal(3)
    with (
        pytest.raises(MemoryFullError) as caught,
        explaining_memory(journal),
        journal.at(stage="constitutional AI", round=2),
    ):
        raise FULL
    line = line_of(caught.value)
    assert line.startswith("error: ") and line.endswith("(rank 3, constitutional AI, round 2)")
    assert "cai.max_length" in line
    with journal.at(stage="evaluate, after CAI"):
        found = to_picklable(torch.OutOfMemoryError("CUDA out of memory"), journal)
    assert isinstance(found, MemoryFullError) and "eval.batch_size" in str(found)
    assert to_picklable(found, journal) is found and isinstance(to_picklable(RuntimeError("bug"), journal), RunError)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), explaining_memory(Journal()):
        raise ZeroDivisionError
