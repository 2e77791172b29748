"""The process world: start-up and teardown, lanes, and :class:`GroupRanks` over all processes.

This file and its neighbours in ``fedsim/parallel`` are the only ones that touch ``torch.distributed``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from fedsim.base.errors import ConfigError, FedsimError, RunError
from fedsim.base.journal import Journal
from fedsim.base.planner import deal_units
from fedsim.base.ranks import OneRank, Ranks
from fedsim.parallel.device import NCCL, Placement, Seat, choose_device, exchange_seats, seat_of, set_allocator
from fedsim.parallel.exits import LAST_S, exit_now, kill_after, log_signal, multi_process, single_process, to_picklable
from fedsim.parallel.host_memory import keep_freed_memory
from fedsim.parallel.signals import StopRequest
from fedsim.parallel.sums import Summer, Traffic

T = TypeVar("T")
R = TypeVar("R")


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
        journal: where this process is, and its log.
        stop: whether it was asked to stop.
        leaving: what is to be done once this process has said why it leaves; None does it at once.
        placement: where every rank computes.
    """

    ranks: Ranks
    device: torch.device
    exact: bool
    timeout: timedelta = timedelta(minutes=30)
    traffic: Traffic = field(default_factory=Traffic)
    journal: Journal = field(default_factory=Journal)
    stop: StopRequest = field(default_factory=StopRequest)
    leaving: ExitStack | None = None
    placement: Placement = field(default_factory=Placement)
    _groups: dict[tuple[int, int], dist.ProcessGroup | None] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.ranks.size

    @property
    def sharing(self) -> int:
        """Number of processes that share this one's GPU, or the machine's memory on the CPU; itself included."""
        return self.placement.sharing(self.rank)

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
        over_nccl = self.placement.backend == NCCL
        summer = Summer(group, exact=self.exact, device=self.device, traffic=self.traffic, heartbeat=over_nccl)
        return Lane(self.rank - first_rank, width, summer)

    def on_exit(self, act: Callable[[], None]) -> None:
        """Do something when this process leaves the world: after exit.json is written."""
        if self.leaving is None:
            act()
        else:
            self.leaving.callback(act)

    def everyone(self) -> Lane:
        """One lane of all ranks."""
        return self.lane(0, self.size)


class GroupRanks:
    """:class:`fedsim.base.ranks.Ranks` over the default process group.

    Args:
        traffic: counts what this rank contributes.
        journal: knows where this rank is when it fails.
    """

    def __init__(self, traffic: Traffic, journal: Journal) -> None:
        self.traffic = traffic
        self.journal = journal
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
                failure = to_picklable(error, self.journal)
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
                failure = to_picklable(error, self.journal)
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
            failure = to_picklable(error, self.journal)
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


@contextmanager
def process_world(
    *, exact: bool, threads: int, timeout_s: float, device: str = "auto", signals: bool = True
) -> Iterator[World]:
    """Join the processes that a launcher started (or run alone), and leave them in every case.

    Any launcher will do that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and LOCAL_RANK if that is not RANK:
    torchrun, deepspeed, srun or a user's own, whether or not it ends the other processes when one fails.
    :mod:`fedsim.parallel.exits` says how they leave.

    Args:
        exact: order-independent sums and deterministic kernels.
        threads: CPU threads of this process.
        timeout_s: collectives that wait longer end the run.
        device: ``parallel.device``: auto, cuda or cpu.
        signals: take SIGTERM and SIGINT as a wish to stop; off, the caller's handlers stay.

    Raises:
        ConfigError: no GPU can be used where one is wanted (:func:`choose_device`).
        RunError: the processes cannot meet.
        SystemExit: another rank cannot start, and says why.
    """
    torch.set_num_threads(threads)
    if device != "cpu":
        set_allocator()
    if device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    if exact:
        torch.use_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    size = _world_size()
    seat, own = _seat(device)
    if size == 1 and isinstance(seat, Exception):
        raise seat
    stop, journal = StopRequest(), Journal(_rank())
    stop.on_signal = lambda number: log_signal(journal, number)
    stop.on_deadline = lambda number, at_once: exit_now(journal, number, size, at_once)
    with stop.listening() if signals else nullcontext():
        if size == 1:
            assert isinstance(seat, Seat)
            with ExitStack() as leaving, single_process(journal):
                yield World(
                    OneRank(), own, exact, journal=journal, stop=stop, leaving=leaving, placement=Placement((seat,))
                )
            return
        _stay_on_this_machine(size)
        # torch keeps the last 2,000 collectives with their stacks, which over some hundred rounds looks like a leak
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "100")
        timeout = timedelta(seconds=timeout_s)
        store, rank = _meet(timeout)
        placement = exchange_seats(store, rank, size, seat, timeout)
        dist.init_process_group(placement.backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            with ExitStack() as leaving, multi_process(store, journal, size, timeout_s):
                traffic = Traffic()
                ranks = GroupRanks(traffic, journal)
                yield World(ranks, own, exact, timeout, traffic, journal, stop, leaving, placement)
        finally:
            with kill_after(LAST_S):
                dist.destroy_process_group()


def _seat(wanted: str) -> tuple[Seat | ConfigError | RunError, torch.device]:
    """This process's seat with its device, or why it has none, which the other ranks are to hear of too."""
    try:
        device = choose_device(wanted)
        return seat_of(device), device
    except (ConfigError, RunError) as error:
        return error, torch.device("cpu")


def _world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise RunError(
            f"WORLD_SIZE={given!r}: must be a whole number >= 1; unset it, or start with torchrun or deepspeed"
        )
    return int(given)


def _rank() -> int:
    """This process's rank as the launcher has it; an invalid RANK is reported at rendezvous."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


def _stay_on_this_machine(size: int) -> None:
    """Let gloo listen on the loopback interface alone, where all processes are here; a user's own choice counts.

    By itself it takes the address that the machine's name has, and what it receives is unpickled.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size) and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


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
    # torchrun keeps its store over a restart, and a process may join again: the addresses and words of the time before
    # must not be found there. All ranks join equally often.
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(f"{attempt}-{store.add(f'{attempt}-rank-{rank}', 1)}", store), rank
