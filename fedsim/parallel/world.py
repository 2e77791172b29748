"""The process world: start-up and teardown, lanes, and :class:`GroupRanks` over all processes.

This file and its neighbours in ``fedsim/parallel`` are the only ones that touch ``torch.distributed``.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from fedsim.disk import is_disk_full
from fedsim.errors import DiskFullError, FedsimError, RunError
from fedsim.parallel.planner import deal_units
from fedsim.parallel.sums import Summer, Traffic
from fedsim.ranks import OneRank, Ranks

T = TypeVar("T")
R = TypeVar("R")

_GRACE_S = 3.0


@dataclass(frozen=True)
class Lane:
    """A process sub-group that trains one client at a time."""

    index: int
    size: int
    summer: Summer


@dataclass
class World:
    """All processes of the run, seen from this one.

    Attributes:
        ranks: shares stages' work.
        device: where this process computes.
        exact: whether sums are order-independent.
        timeout: a collective of a lane that waits longer ends the run.
        traffic: bytes that this process has handed to collectives.
    """

    ranks: Ranks
    device: torch.device
    exact: bool
    timeout: timedelta = timedelta(minutes=30)
    traffic: Traffic = field(default_factory=Traffic)
    _groups: dict[tuple[int, int], dist.ProcessGroup | None] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.ranks.size

    def lane(self, first_rank: int, width: int) -> Lane:
        """The lane of ``width`` ranks from ``first_rank`` on.

        Wide lanes must be asked for by every rank in the same order (a new process group is made the first time).
        """
        group = None
        if width > 1:
            if (first_rank, width) not in self._groups:
                members = list(range(first_rank, first_rank + width))
                self._groups[(first_rank, width)] = dist.new_group(members, timeout=self.timeout)
            group = self._groups[(first_rank, width)]
        summer = Summer(group, exact=self.exact, device=self.device, traffic=self.traffic)
        return Lane(self.rank - first_rank, width, summer)

    def everyone(self) -> Lane:
        """One lane of all ranks."""
        return self.lane(0, self.size)


class GroupRanks:
    """:class:`fedsim.ranks.Ranks` over the default process group.

    Args:
        traffic: counts what this rank contributes.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.is_main = self.rank == 0

    def map(
        self,
        compute: Callable[[T], R],
        units: Sequence[T],
        costs: Sequence[float] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[R]:
        """Compute this rank's share of the units and gather all results in order."""
        mine = deal_units(costs if costs is not None else [1.0] * len(units), self.size)[self.rank]
        done: dict[int, R] = {}
        failure: FedsimError | None = None
        for unit in mine:
            try:
                done[unit] = compute(units[unit])
            except Exception as error:
                failure = portable(error, self.rank)
                break
            if on_done is not None:
                on_done(len(done))
        shares = self.gather((done, failure))
        for _, failed in shares:
            if failed is not None:
                raise failed
        merged = {unit: value for share, _ in shares for unit, value in share.items()}
        return [merged[unit] for unit in range(len(units))]

    def once(self, compute: Callable[[], R]) -> R:
        """Compute on rank 0 and send the result, or the error, to all."""
        result: R | None = None
        failure: FedsimError | None = None
        box: list[bytes | None] = [None]
        if self.is_main:
            try:
                result = compute()
            except Exception as error:
                failure = portable(error, 0)
            box[0] = self._pickled((result, failure))
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if not self.is_main:
            result, failure = pickle.loads(cast(bytes, box[0]))
        if failure is not None:
            raise failure
        return cast(R, result)

    def each(self, compute: Callable[[], R]) -> list[R]:
        """Compute on every rank and exchange results and errors."""
        result: R | None = None
        failure: FedsimError | None = None
        try:
            result = compute()
        except Exception as error:
            failure = portable(error, self.rank)
        shares = self.gather((result, failure))
        for _, failed in shares:
            if failed is not None:
                raise failed
        return cast(list[R], [value for value, _ in shares])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; it must pickle."""
        out: list[bytes | None] = [None] * self.size
        dist.all_gather_object(out, self._pickled(value))
        return [cast(T, pickle.loads(cast(bytes, data))) for data in out]

    def _pickled(self, value: object) -> bytes:
        """A value as it travels, counted."""
        data = pickle.dumps(value)
        self.traffic.num_bytes += len(data)
        return data


def portable(error: Exception, rank: int) -> FedsimError:
    """An error that can travel to other ranks: fedsim's own as it is, any other with its traceback as text."""
    if isinstance(error, FedsimError):
        return error
    if is_disk_full(error):
        return DiskFullError(str(error))
    trace = "".join(traceback.format_exception(error))
    return RunError(f"rank {rank} failed with {type(error).__name__}: {error}\n{trace}")


@contextmanager
def process_world(*, exact: bool, threads: int, timeout_s: float) -> Iterator[World]:
    """Join the processes that a launcher started (or run alone), and leave them in every case.

    Any launcher will do that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: torchrun, deepspeed, or a
    user's own, whether or not it ends the other processes when one fails. An error leaves on rank 0, or on the first
    rank that fails alone. The others fail alike, or because they miss that rank: they end quietly with exit status 2,
    so that a user reads one error, the cause.

    Args:
        exact: order-independent sums and deterministic kernels.
        threads: CPU threads of this process.
        timeout_s: collectives that wait longer end the run.

    Raises:
        RunError: the processes cannot meet.
    """
    torch.set_num_threads(threads)
    if exact:
        torch.use_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    size = _world_size()
    device = _device(size)
    if size == 1:
        yield World(OneRank(), device, exact)
        return
    one_gpu_each = device.type == "cuda" and torch.cuda.device_count() >= size
    backend = "cpu:gloo,cuda:nccl" if one_gpu_each else "gloo"
    # torch keeps the last 2,000 collectives with their stacks, which over some hundred rounds would look like a leak
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "100")
    timeout = timedelta(seconds=timeout_s)
    store, rank = _meet(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        traffic = Traffic()
        yield World(GroupRanks(traffic), device, exact, timeout, traffic)
    except Exception as error:
        speaks = _speaks(store, rank)
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            atexit.register(_outlast, store, size)  # the store is in this process, and the others have yet to ask it
        if not speaks:
            time.sleep(1.0)  # launchers end every rank when one exits: let the one that speaks be the first
            raise SystemExit(2) from error
        raise
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise RunError(
            f"WORLD_SIZE={given!r}: must be a whole number >= 1; unset it, or start with torchrun or deepspeed"
        )
    return int(given)


def _meet(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store that all processes share, and this one's rank."""
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        given = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}
        values = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise RunError(
            f"the processes cannot meet ({values}): {' '.join(str(error).split())[:200]}; start them with torchrun or "
            "deepspeed, and give each run on a machine a --master_port of its own"
        ) from error
    return store, rank


def _outlast(store: dist.Store, size: int, patience_s: float = 10.0) -> None:
    """Stay until every rank has asked who speaks, or for ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and int(store.add("fedsim/failures", 0)) < size:
        time.sleep(0.05)


def _speaks(store: dist.Store, rank: int) -> bool:
    """Whether this failed rank reports its error: rank 0 where it fails too, else the first rank that failed.

    The others give rank 0 :data:`_GRACE_S` seconds to fail. True where that cannot be asked, so that no error is lost.
    """
    deadline = time.monotonic() + _GRACE_S
    try:
        if rank == 0:
            store.add("fedsim/rank_0_failed", 1)
        while rank != 0 and store.add("fedsim/rank_0_failed", 0) == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        may_speak = rank == 0 or store.add("fedsim/rank_0_failed", 0) == 0
        speaks = may_speak and store.add("fedsim/spoken", 1) == 1
        store.add("fedsim/failures", 1)
        return speaks
    except RuntimeError:
        return True


def _device(size: int) -> torch.device:
    """This process's GPU (shared round-robin if there are fewer GPUs than processes), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
