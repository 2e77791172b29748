"""Start-up and teardown of a run's processes, lanes, and :class:`GroupRanks` over all of them.

This file and the others in ``fedsim/parallel`` are the only ones that touch ``torch.distributed``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from fedsim.parallel.device import (
    NCCL,
    Placement,
    Seat,
    choose_device,
    exchange_seats,
    seat_of,
    set_allocator,
)
from fedsim.parallel.exits import (
    LAST_S,
    exit_now,
    kill_after,
    log_signal,
    multi_process,
    single_process,
    to_picklable,
)
from fedsim.parallel.host_memory import keep_freed_memory
from fedsim.parallel.signals import StopRequest
from fedsim.parallel.sums import Summer, Traffic

T = TypeVar("T")
R = TypeVar("R")

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
"""Variables by which a launcher says where the processes meet."""


@dataclass(frozen=True)
class Lane:
    """Sub-group of processes that trains one client at a time."""

    index: int
    size: int
    summer: Summer


@dataclass
class World:
    """All processes of the run, as this one sees them.

    Attributes:
        ranks: shares the work of stages over processes.
        device: of this process.
        exact: True for order-independent sums.
        timeout: of a lane's collectives; one that waits longer ends the run.
        traffic: bytes that this process has handed to collectives.
        journal: this process's place in the run, and its log.
        stop: whether this process was asked to stop.
        leaving: callbacks after ``exit.json`` is written; None calls them at once.
        placement: devices of all ranks.
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
        """Rank of this process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.ranks.size

    @property
    def sharing(self) -> int:
        """Number of processes on this one's GPU, or on the machine's CPU; itself included."""
        return self.placement.sharing(self.rank)

    def lane(self, first_rank: int, width: int) -> Lane:
        """The lane of ``width`` ranks from ``first_rank`` on.

        Every rank must ask for wide lanes in the same order: the first time makes a new process
        group.
        """
        # A lane of one process needs no group; the others keep theirs for the whole run.
        group = None
        if width > 1:
            if (first_rank, width) not in self._groups:
                members = list(range(first_rank, first_rank + width))
                self._groups[(first_rank, width)] = dist.new_group(members, timeout=self.timeout)
            group = self._groups[(first_rank, width)]
        over_nccl = self.placement.backend == NCCL
        summer = Summer(
            group,
            exact=self.exact,
            device=self.device,
            traffic=self.traffic,
            heartbeat=over_nccl,
        )
        return Lane(self.rank - first_rank, width, summer)

    def on_exit(self, act: Callable[[], None]) -> None:
        """Call ``act`` when this process exits, after ``exit.json`` is written."""
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
        traffic: counts the bytes that this rank contributes.
        journal: gives the place of this rank when it fails.
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
        if costs is None:
            costs = [1.0] * len(units)
        mine = deal_units(costs, self.size)[self.rank]

        # This rank's units, up to the first that fails: unit -> result.
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

        # Every rank raises the failure of the lowest rank, or merges all results.
        shares = self.gather((done, failure))
        merged: dict[int, R] = {}
        for results, failed in shares:
            if failed is not None:
                raise failed
            merged.update(results)
        return [merged[unit] for unit in range(len(units))]

    def once(self, compute: Callable[[], R]) -> R:
        """Compute on rank 0 and send the result, or the error, to all."""
        # Rank 0 computes and pickles; the box is empty elsewhere.
        result: R | None = None
        failure: FedsimError | None = None
        box: list[bytes | None] = [None]
        if self.is_main:
            try:
                result = compute()
            except Exception as error:
                failure = to_picklable(error, self.journal)
            box[0] = self._pickled((result, failure))

        # All ranks take the result, or raise the error.
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if not self.is_main:
            result, failure = pickle.loads(cast(bytes, box[0]))
        if failure is not None:
            raise failure
        return cast(R, result)

    def each(self, compute: Callable[[], R]) -> list[R]:
        """Compute on every rank; returns all results by rank, or raises the lowest rank's error."""
        # An error must not keep this rank from the exchange: the others would wait.
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
        """Gather a value of every rank, by rank; values must pickle."""
        out: list[bytes | None] = [None] * self.size
        dist.all_gather_object(out, self._pickled(value))
        return [cast(T, pickle.loads(cast(bytes, data))) for data in out]

    def _pickled(self, value: object) -> bytes:
        """Pickle a value for sending, and count its bytes."""
        data = pickle.dumps(value)
        self.traffic.num_bytes += len(data)
        return data


@contextmanager
def process_world(
    *, exact: bool, threads: int, timeout_s: float, device: str = "auto", signals: bool = True
) -> Iterator[World]:
    """Join the processes that a launcher started, if any, and take the group down in every case.

    Any launcher works that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and LOCAL_RANK if
    that is not RANK: torchrun, deepspeed, srun or a user's own, whether or not it ends the other
    processes when one fails. :mod:`fedsim.parallel.exits` describes how they exit.

    Args:
        exact: order-independent sums and deterministic kernels.
        threads: CPU threads of this process.
        timeout_s: seconds; collectives that wait longer end the run.
        device: ``parallel.device``: auto, cuda or cpu.
        signals: take SIGTERM, SIGINT and SIGHUP as stop requests; off, the caller's handlers stay.

    Raises:
        ConfigError: no GPU can be used where one is wanted (:func:`choose_device`).
        RunError: the processes cannot meet.
        SystemExit: another rank cannot start, and reports why.
    """
    # Settings that must precede the first tensor on a device.
    torch.set_num_threads(threads)
    if device != "cpu":
        set_allocator()
    if device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    if exact:
        torch.use_deterministic_algorithms(True, warn_only=False)
        # No tensor is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    # This process's device and signal handlers.
    size = _world_size()
    seat, own = _seat(device)
    if size == 1 and isinstance(seat, Exception):
        raise seat
    stop, journal = StopRequest(), Journal(_rank())
    stop.on_signal = lambda number: log_signal(journal, number)
    stop.on_deadline = lambda number, at_once: exit_now(journal, number, size, at_once)
    with ExitStack() as listening:
        if signals:
            listening.enter_context(stop.listening())
        if size == 1:
            assert isinstance(seat, Seat)
            placement = Placement((seat,))
            with ExitStack() as leaving, single_process(journal):
                yield World(
                    OneRank(),
                    own,
                    exact,
                    journal=journal,
                    stop=stop,
                    leaving=leaving,
                    placement=placement,
                )
            return

        # Several processes: meet, exchange devices, and choose the backend.
        _stay_on_this_machine(size)
        # torch keeps the last 2,000 collectives with their stacks: over some hundred rounds that
        # looks like a leak.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "100")
        timeout = timedelta(seconds=timeout_s)
        store, rank = _meet(timeout)
        placement = exchange_seats(store, rank, size, seat, timeout)
        dist.init_process_group(
            placement.backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        try:
            with ExitStack() as leaving, multi_process(store, journal, size, timeout_s):
                traffic = Traffic()
                ranks = GroupRanks(traffic, journal)
                yield World(ranks, own, exact, timeout, traffic, journal, stop, leaving, placement)
        finally:
            with kill_after(LAST_S):
                dist.destroy_process_group()


def _seat(wanted: str) -> tuple[Seat | ConfigError | RunError, torch.device]:
    """Device of this process; or the error why it has none, to be published, and the CPU."""
    try:
        device = choose_device(wanted)
        return seat_of(device), device
    except (ConfigError, RunError) as error:
        return error, torch.device("cpu")


def _world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher.

    Raises:
        RunError: WORLD_SIZE is no whole number >= 1.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        fix = "unset it, or start with torchrun or deepspeed"
        raise RunError(f"WORLD_SIZE={given!r}: must be a whole number >= 1; {fix}")
    return int(given)


def _rank() -> int:
    """This process's rank as the launcher has it; an invalid RANK is reported at rendezvous."""
    given = os.environ.get("RANK", "0")
    if not given.isdecimal():
        return 0
    return int(given)


def _stay_on_this_machine(size: int) -> None:
    """Let gloo listen on the loopback interface only, if all processes are on this machine.

    Its default is the address of the machine's name, and received objects are unpickled. A user's
    own GLOO_SOCKET_IFNAME is kept.
    """
    all_here = os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size)
    if all_here and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _meet(timeout: timedelta) -> tuple[dist.Store, int]:
    """Rendezvous: the store that all processes share, and this one's rank.

    Raises:
        RunError: the processes cannot meet.
    """
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        values = ", ".join(f"{name}={os.environ[name]}" for name in _ADDRESS if name in os.environ)
        raise RunError(
            f"the processes cannot meet ({values}): {' '.join(str(error).split())[:200]}; start "
            "them with torchrun or deepspeed, and give each run on a machine a --master_port of "
            "its own"
        ) from error
    # torchrun keeps its store over a restart, and a process may join again: entries of an earlier
    # attempt must not be found. All ranks join equally often, so that they count the same attempts.
    # They are kept apart by a prefix of their keys.
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(f"{attempt}-{store.add(f'{attempt}-rank-{rank}', 1)}", store), rank
