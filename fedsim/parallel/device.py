"""Device of each process, and the backend that sums over processes.

Every process publishes its device in the store, so that all know which of them share a GPU. NCCL
takes one whole GPU per process; where processes share one, or compute on parts of one (MIG), gloo
carries the sums through host memory.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from fedsim.attention.backends import leave_out_cudnn
from fedsim.base.errors import ConfigError, RunError
from fedsim.parallel.drivers import installed_driver, no_gpu_message

GLOO: Final = "gloo"
NCCL: Final = "cpu:gloo,cuda:nccl"
"""Backends by torch's names: NCCL sums tensors on GPUs, gloo everything else."""

ALLOCATOR: Final = "PYTORCH_ALLOC_CONF"
"""Variable of torch's allocator, read when CUDA starts; torch 2.11 is the first with this name."""

OLD_ALLOCATOR: Final = "PYTORCH_CUDA_ALLOC_CONF"

READ_S: Final = 5.0
"""Seconds that a rank without a device waits for the others to read why, before it exits."""


@dataclass(frozen=True)
class Seat:
    """Device of a process, as the others see it.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        identity: UUID of its GPU or MIG instance; "" on the CPU.
        name: of the GPU; "" on the CPU.
        is_part: it is a MIG instance, a part of a GPU.
    """

    kind: str = "cpu"
    identity: str = ""
    name: str = ""
    is_part: bool = False


@dataclass(frozen=True)
class Placement:
    """Devices of all processes, by rank."""

    seats: tuple[Seat, ...] = (Seat(),)

    @property
    def backend(self) -> str:
        """:data:`NCCL` where every process has a whole GPU of its own, else :data:`GLOO`."""
        if self._on_gpus and not self._why_gloo():
            return NCCL
        return GLOO

    def sharing(self, rank: int) -> int:
        """Number of processes on this rank's GPU, or on the machine's CPU; itself included."""
        return sum(seat.identity == self.seats[rank].identity for seat in self.seats)

    def words(self) -> str:
        """Describe the backend in one line, with the reason where GPUs are summed over gloo."""
        if not self._on_gpus:
            return "gloo"
        if self.backend == NCCL:
            return "NCCL, one GPU each"
        return f"gloo through host memory, slower than NCCL: {self._why_gloo()}"

    def facts(self) -> dict[str, object]:
        """Manifest entries: the backend, and each rank's device by name and UUID."""
        return {"backend": self.backend, "ranks": [asdict(seat) for seat in self.seats]}

    @property
    def _on_gpus(self) -> bool:
        return self.seats[0].kind == "cuda"

    def _why_gloo(self) -> str:
        """Reason why NCCL cannot sum over these GPUs; "" if it can."""
        parts = [rank for rank, seat in enumerate(self.seats) if seat.is_part]
        if parts:
            return f"{_ranks(parts)} on a MIG instance, which NCCL does not join"
        # Ranks by their GPU's UUID.
        by_gpu: dict[str, list[int]] = {}
        for rank, seat in enumerate(self.seats):
            by_gpu.setdefault(seat.identity, []).append(rank)
        groups = [_ranks(sharing) for sharing in by_gpu.values() if len(sharing) > 1]
        if not groups:
            return ""
        return f"{'; '.join(groups)} on one GPU"


def set_allocator() -> None:
    """Let CUDA's allocator grow its segments, unless the user has set it up.

    To be called before CUDA starts.

    Token counts differ from step to step, and phases alternate between activations and caches of
    tens of GiB: fixed segments would fragment (PyTorch, CUDA semantics, "Optimizing memory usage
    with PYTORCH_ALLOC_CONF").
    """
    if ALLOCATOR not in os.environ and OLD_ALLOCATOR not in os.environ:
        os.environ[ALLOCATOR] = "expandable_segments:True"


def local_rank() -> int:
    """Number of this process on the machine; 0 without a launcher.

    LOCAL_RANK, or RANK where the launcher sets none.

    Raises:
        RunError: it is no whole number >= 0.
    """
    name = "RANK"
    if "LOCAL_RANK" in os.environ:
        name = "LOCAL_RANK"
    given = os.environ.get(name, "0")
    if not given.isdecimal():
        raise RunError(
            f"{name}={given!r}: must be a whole number >= 0; start with torchrun or deepspeed",
        )
    return int(given)


def choose_device(wanted: str) -> torch.device:
    """Choose this process's device.

    A GPU becomes the current one, without cuDNN's attention kernels.

    Processes take the visible GPUs in turn by :func:`local_rank`; with one visible GPU each (srun
    --gpus-per-task=1) that is GPU 0 everywhere.

    Args:
        wanted: ``parallel.device``. auto takes a GPU, and the CPU only where torch is built without
            CUDA and no NVIDIA driver is loaded; cuda always takes a GPU, cpu never.

    Raises:
        ConfigError: no GPU can be used where one is wanted, or expected.
        RunError: :func:`local_rank`.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    # torch's warning of an old driver comes again below, in the error.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        num_gpus = 0
        if torch.cuda.is_available():
            num_gpus = torch.cuda.device_count()

    # Without a GPU: the CPU only where nothing suggests that there should be one.
    if num_gpus == 0:
        driver, cuda = installed_driver(), torch.version.cuda
        if wanted == "auto" and driver is None and cuda is None:
            return torch.device("cpu")
        raise ConfigError(
            no_gpu_message(
                wanted=wanted,
                torch_version=torch.__version__,
                cuda=cuda,
                driver=driver,
                visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
                torch_says=_refusal(),
            )
        )

    # The processes of a machine take its GPUs in turn.
    device = torch.device("cuda", local_rank() % num_gpus)
    leave_out_cudnn()
    _try(device)
    return device


def _refusal() -> str:
    """Torch's message on why CUDA cannot start; "" if it can."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def _try(device: torch.device) -> None:
    """Make a GPU the current one and run one kernel.

    Raises:
        ConfigError: the GPU runs none, as torch has no kernels for its architecture, or it is
            taken, full or broken.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1.0).item()
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        if "no kernel image" not in said:  # taken by another process, full, or broken
            raise ConfigError(
                f"GPU {device.index} cannot be used (torch: {said}); see nvidia-smi for what holds "
                "it, choose other GPUs with CUDA_VISIBLE_DEVICES, or set parallel.device=cpu"
            ) from error
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"GPU {device.index} ({torch.cuda.get_device_name(device)}, sm_{major}{minor}) runs no "
            f"kernel of torch {torch.__version__}, which is built for "
            f"{', '.join(torch.cuda.get_arch_list())} (torch: {said}); choose other GPUs with "
            "CUDA_VISIBLE_DEVICES, install a build with kernels for it (docs/gpu.md has the "
            "table), or set parallel.device=cpu"
        ) from error


def seat_of(device: torch.device) -> Seat:
    """Describe this process's device for the others."""
    if device.type != "cuda":
        return Seat()
    found = torch.cuda.get_device_properties(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    listed = ""  # the device's entry in CUDA_VISIBLE_DEVICES
    if index < len(visible):
        listed = visible[index].strip()
    is_part = listed.startswith("MIG") or " MIG " in f"{found.name} "
    identity = str(found.uuid)
    if listed.startswith("MIG"):  # the UUID may be that of the whole GPU
        identity = listed
    return Seat("cuda", identity, found.name, is_part)


def exchange_seats(
    store: dist.Store, rank: int, size: int, mine: Seat | ConfigError | RunError, timeout: timedelta
) -> Placement:
    """Exchange the devices of all ranks through the store.

    Args:
        store: shared by all ranks.
        mine: this rank's device, or the error why it has none.
        timeout: for each other rank's answer.

    Raises:
        ConfigError, RunError: this is the first rank without a device; or (on every rank) a rank
            does not answer, the store is gone, or some are on the CPU and others on GPUs.
        SystemExit: another rank has no device, and reports it.
    """
    # Publish this rank's device, or its error.
    if isinstance(mine, Exception):
        published: dict[str, object] = {"error": str(mine)}
    else:
        published = asdict(mine)
    gone = f"rank 0 of {size}, or the launcher, left while the processes met; see its own messages"
    with _store_error(gone):
        store.set(f"fedsim/seat/{rank}", json.dumps(published))
    # Read all ranks' entries, and count the ranks that have read them.
    entries = []
    for other in range(size):
        key = f"fedsim/seat/{other}"
        with _store_error(
            f"rank {other} of {size} did not start within {timeout.total_seconds():g} s "
            "(parallel.timeout_s); see its own messages, and start as many processes as "
            "WORLD_SIZE says"
        ):
            store.wait([key], timeout)
            entries.append(json.loads(store.get(key)))  # its process may have ended since
    with _store_error(gone):
        store.add("fedsim/seats_read", 1)
    # The first rank without a device raises its error; the others exit quietly.
    failed = [other for other, found in enumerate(entries) if "error" in found]
    if failed:
        if rank == failed[0]:
            _wait_for_readers(store, size)
            assert isinstance(mine, Exception)
            raise mine
        # Launchers end every rank when one exits: let the reporting rank exit first.
        time.sleep(1.0)
        raise SystemExit(2)

    # All on CPUs, or all on GPUs.
    placement = Placement(tuple(Seat(**found) for found in entries))
    kinds = {seat.kind for seat in placement.seats}
    if len(kinds) > 1:
        _wait_for_readers(store, size)
        on_cpu = [other for other, seat in enumerate(placement.seats) if seat.kind == "cpu"]
        raise RunError(
            f"{_ranks(on_cpu)} on the CPU and the others on GPUs: all must compute on one kind of "
            "device; set parallel.device=cpu, or give every process a GPU"
        )
    return placement


@contextmanager
def _store_error(message: str) -> Iterator[None]:
    """Raise a :class:`RunError` with this message if the store does not answer, or is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(message) from error


def _wait_for_readers(store: dist.Store, size: int) -> None:
    """Wait until every rank has read the entries: the store may be in this process."""
    deadline = time.monotonic() + READ_S
    with suppress(RuntimeError):  # the store is gone, and its readers with it
        while time.monotonic() < deadline and int(store.add("fedsim/seats_read", 0)) < size:
            time.sleep(0.02)


def _ranks(numbers: Sequence[int]) -> str:
    """``rank 0 is`` or ``ranks 0, 2 are``."""
    listed = ", ".join(map(str, numbers))
    if len(numbers) == 1:
        return f"rank {listed} is"
    return f"ranks {listed} are"
