"""Devices, seats and backends over layouts of GPUs, with torch.cuda replaced by a description of the machine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from fedsim.base.errors import ConfigError, RunError
from fedsim.parallel import device as module
from fedsim.parallel.device import (
    ALLOCATOR,
    GLOO,
    NCCL,
    OLD_ALLOCATOR,
    Placement,
    Seat,
    choose_device,
    exchange_seats,
    local_rank,
    seat_of,
    set_allocator,
)
from fedsim.run.memory import free_memory

GIB = 2**30


@dataclass
class Machine:
    """What one process sees: its GPUs by UUID and name, and its environment."""

    uuids: list[str] = field(default_factory=list)
    name: str = "NVIDIA A100-SXM4-80GB"
    cuda: str | None = "13.0"
    driver: str | None = "580.65.06"
    says: str = "No CUDA GPUs are available"
    broken: bool = False
    current: int | None = None


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Make this process see a machine."""
    for name in ("LOCAL_RANK", "RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def install(machine: Machine, **environment: str) -> Machine:
        def init() -> None:
            raise RuntimeError(machine.says)

        def set_device(chosen: torch.device) -> None:
            machine.current = chosen.index

        def ones(*_: int, device: torch.device) -> torch.Tensor:
            if machine.broken:
                raise RuntimeError("CUDA error: no kernel image is available")
            return torch.zeros(1)

        fake = {
            "is_available": lambda: bool(machine.uuids),
            "device_count": lambda: len(machine.uuids),
            "init": init,
            "set_device": set_device,
            "get_device_properties": lambda d: SimpleNamespace(uuid=machine.uuids[d.index], name=machine.name),
            "get_device_name": lambda d: machine.name,
            "get_device_capability": lambda d: (7, 0),
            "get_arch_list": lambda: ["sm_75", "sm_80"],
        }
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", machine.cuda)
        monkeypatch.setattr(module, "installed_driver", lambda: machine.driver)
        monkeypatch.setattr(module.torch, "ones", ones)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return machine

    return install


def test_the_local_rank_defaults_to_the_rank(see: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = see(Machine(uuids=["a", "b", "c", "d"]), RANK="2")
    assert local_rank() == 2 and choose_device("auto") == torch.device("cuda", 2) and machine.current == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(RunError, match="LOCAL_RANK='first'"):
        choose_device("auto")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("RANK")
    assert local_rank() == 0


def test_with_one_visible_gpu_a_process_takes_it(see: Callable[..., Machine]) -> None:
    """srun --gpus-per-task=1: every process sees one GPU, its own."""
    see(Machine(uuids=["c"]), RANK="2", LOCAL_RANK="2")
    device = choose_device("auto")
    assert device == torch.device("cuda", 0) and seat_of(device) == Seat("cuda", "c", "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("cuda", ["13.0", None])
@pytest.mark.parametrize("driver", ["535.183.01", "580.65.06", None])
def test_without_a_usable_gpu(see: Callable[..., Machine], wanted: str, cuda: str | None, driver: str | None) -> None:
    """The CPU is taken where it is asked for, or where nothing on the machine speaks for a GPU."""
    see(Machine(cuda=cuda, driver=driver))
    if wanted == "cpu" or (wanted == "auto" and cuda is None and driver is None):
        assert choose_device(wanted) == torch.device("cpu")
        return
    with pytest.raises(ConfigError, match=f"parallel.device={wanted}: ") as caught:
        choose_device(wanted)
    assert driver is None or driver in str(caught.value)
    assert cuda is None or "No CUDA GPUs are available" in str(caught.value), "torch's own words"


def test_a_gpu_is_left_alone_where_the_cpu_is_asked_for(see: Callable[..., Machine]) -> None:
    machine = see(Machine(uuids=["a"]))
    assert choose_device("cpu") == torch.device("cpu") and machine.current is None


def test_a_gpu_that_runs_no_kernel_is_an_error(see: Callable[..., Machine]) -> None:
    see(Machine(uuids=["a"], name="Tesla V100", broken=True))
    with pytest.raises(
        ConfigError, match=r"Tesla V100, sm_70\) runs no kernel.*sm_75, sm_80.*no kernel image"
    ) as caught:
        choose_device("auto")
    assert "parallel.device=cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "name"), [("MIG-one,MIG-two", "NVIDIA A100-SXM4-80GB MIG 3g.40gb"), ("MIG-one", "NVIDIA A100")]
)
def test_a_mig_instance_is_known_by_its_own_name(see: Callable[..., Machine], visible: str, name: str) -> None:
    """CUDA shows a process one instance; the driver may give the whole GPU's UUID for it."""
    see(Machine(uuids=["parent"], name=name), CUDA_VISIBLE_DEVICES=visible, RANK="3")
    assert seat_of(choose_device("auto")) == Seat("cuda", "MIG-one", name, is_part=True)


layouts = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@given(layouts, st.booleans())
def test_nccl_takes_a_whole_gpu_for_each_rank(gpus: list[int], parts: bool) -> None:
    """Rank r is on GPU gpus[r]; with parts, GPU 0 is a MIG instance."""
    seats = tuple(Seat("cuda", f"GPU-{gpu}", "name", is_part=parts and gpu == 0) for gpu in gpus)
    placement = Placement(seats)
    distinct = len(set(gpus)) == len(gpus)
    whole = not (parts and 0 in gpus)
    assert (placement.backend == NCCL) == (distinct and whole) and placement.backend in (NCCL, GLOO)
    for rank, gpu in enumerate(gpus):
        assert placement.sharing(rank) == gpus.count(gpu)
    if placement.backend == GLOO:
        assert "gloo" in placement.words() and "rank" in placement.words() and "\n" not in placement.words()
    else:
        assert placement.words() == "NCCL, one GPU each"


@given(st.integers(1, 8))
def test_on_the_cpu_all_share_the_machine_over_gloo(size: int) -> None:
    placement = Placement((Seat(),) * size)
    assert placement.backend == GLOO and placement.sharing(size - 1) == size and placement.words() == "gloo"


@pytest.mark.parametrize(
    ("visible", "world", "backend", "sharing"),
    [
        ([["a", "b", "c", "d"]] * 4, 4, NCCL, [1, 1, 1, 1]),  # torchrun on four GPUs
        ([["a"], ["b"], ["c"], ["d"]], 4, NCCL, [1, 1, 1, 1]),  # srun --gpus-per-task=1
        ([["a"]] * 4, 4, GLOO, [4, 4, 4, 4]),  # four processes on one GPU
        ([["a", "b"]] * 4, 4, GLOO, [2, 2, 2, 2]),  # in turn
        ([["a", "b"]] * 3, 3, GLOO, [2, 1, 2]),
        ([["a"], ["a"], ["b"]], 3, GLOO, [2, 2, 1]),
    ],
)
def test_layouts_from_the_environment_to_the_memory_of_a_rank(
    see: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
    visible: list[list[str]],
    world: int,
    backend: str,
    sharing: list[int],
) -> None:
    seats = []
    for rank in range(world):
        see(Machine(uuids=visible[rank]), RANK=str(rank), LOCAL_RANK=str(rank))
        seats.append(seat_of(choose_device("auto")))
    placement = Placement(tuple(seats))
    assert placement.backend == backend and [placement.sharing(rank) for rank in range(world)] == sharing
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    shares = [free_memory(torch.device("cuda", 0), placement.sharing(rank)) for rank in range(world)]
    assert shares == [60 * GIB // number for number in sharing]


def exchange(words: list[Seat | ConfigError], timeout_s: float = 5.0, size: int | None = None) -> list[Any]:
    """What :func:`exchange_seats` gives or raises on each rank, all at once."""
    store, results = HashStore(), [None] * len(words)  # type: list[Any]
    size = len(words) if size is None else size

    def one(rank: int) -> None:
        try:
            results[rank] = exchange_seats(store, rank, size, words[rank], timedelta(seconds=timeout_s))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(words))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_know_all_seats() -> None:
    seats = [Seat("cuda", "a", "A100"), Seat("cuda", "b", "A100"), Seat("cuda", "b", "A100", True)]
    assert exchange(list(seats)) == [Placement(tuple(seats))] * 3


def test_of_several_ranks_without_a_gpu_the_first_says_so() -> None:
    failure = ConfigError("no GPU")
    results = exchange([Seat("cuda", "a"), failure, ConfigError("no GPU here either")])
    assert results[1] is failure
    assert all(isinstance(results[rank], SystemExit) and results[rank].code == 2 for rank in (0, 2))


def test_ranks_on_the_cpu_and_on_gpus_do_not_mix() -> None:
    for result in exchange([Seat("cuda", "a"), Seat(), Seat("cuda", "b")]):
        assert isinstance(result, RunError) and "rank 1 is on the CPU and the others on GPUs" in str(result)


def test_a_rank_that_does_not_come_is_named() -> None:
    for result in exchange([Seat(), Seat()], timeout_s=0.3, size=3):
        assert isinstance(result, RunError) and "rank 2 of 3 did not start within 0.3 s" in str(result)


class LosingStore:
    """A store whose server ends at the n-th call of an operation, as it does with the process that holds it."""

    def __init__(self, operation: str, nth: int) -> None:
        self.store, self.operation, self.left = HashStore(), operation, nth

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.left -= name == self.operation
            if self.left <= 0:
                raise torch.distributed.DistNetworkError("Connection reset by peer")
            return getattr(self.store, name)(*arguments)

        return call


@pytest.mark.parametrize(
    ("operation", "nth", "line"),
    [("set", 1, "rank 0 of 2, or the launcher, left"), ("wait", 2, "rank 1 of 2 did not start within 5 s"),
     ("get", 1, "rank 0 of 2 did not start within 5 s"), ("get", 2, "rank 1 of 2 did not start within 5 s"),
     ("add", 1, "rank 0 of 2, or the launcher, left")],
)  # fmt: skip
def test_a_store_that_is_lost_while_seats_are_exchanged_is_one_line(operation: str, nth: int, line: str) -> None:
    store: Any = LosingStore(operation, nth)
    store.store.set("fedsim/seat/1", json.dumps(asdict(Seat())))
    with pytest.raises(RunError) as caught:
        exchange_seats(store, 0, 2, Seat(), timedelta(seconds=5))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_rank_without_a_gpu_says_so_though_the_store_is_lost() -> None:
    """The word is out: what is lost is the wait for those that read it."""
    store: Any = LosingStore("add", 2)
    store.store.set("fedsim/seat/1", json.dumps(asdict(Seat("cuda", "a"))))
    with pytest.raises(ConfigError, match="no GPU"):
        exchange_seats(store, 0, 2, ConfigError("no GPU"), timedelta(seconds=5))


@pytest.mark.parametrize("own", [{}, {ALLOCATOR: "max_split_size_mb:64"}, {OLD_ALLOCATOR: "backend:native"}])
def test_the_allocator_is_set_up_unless_the_user_has_done_so(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    for name in (ALLOCATOR, OLD_ALLOCATOR):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    set_allocator()
    found = {name: os.environ[name] for name in (ALLOCATOR, OLD_ALLOCATOR) if name in os.environ}
    assert found == (own or {ALLOCATOR: "expandable_segments:True"})


def test_torch_reads_the_allocators_variable() -> None:
    """The name must be one that the installed torch knows; a misspelt one would be passed over in silence."""
    libraries = Path(torch.__file__).parent / "lib"
    content = b"".join(file.read_bytes() for file in libraries.glob("libc10*.so"))
    assert f"{ALLOCATOR}\0".encode() in content and b"expandable_segments" in content
