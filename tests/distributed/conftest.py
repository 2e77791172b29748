"""A pool of four worker processes that all multi-process tests share, and the small run that they compare."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
Job = tuple[Any, ...]  # (world size, function, argument, ...)


@dataclass
class _Running:
    """A job on its workers: what each rank has answered so far."""

    members: list[Connection]
    store: TCPStore
    deadline: float
    answers: dict[int, tuple[str, Any]] = field(default_factory=dict)


class WorkerPool:
    """Four processes that form worlds of 1 to 4 ranks, again and again.

    A function runs on every rank with ``RANK``, ``WORLD_SIZE`` and a fresh rendezvous in its environment, as under
    torchrun; it joins by ``process_world``. A job that fails on one rank, or takes too long, ends the whole pool (a
    hung collective cannot be taken back); the next job starts a new one.
    """

    size = 4

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: dict[Connection, int] = {}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the pool

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """``function(*arguments)`` on every rank of a world; the results by rank."""
        return self.run_all([(size, function, *arguments)], timeout_s=timeout_s)[0]

    def run_all(self, jobs: Sequence[Job], timeout_s: float = 120.0) -> list[list[Any]]:
        """Several jobs, side by side where the workers suffice, begun in order; results by job and rank.

        Fails the test with the first error of a worker, as text.
        """
        self._start()
        free = list(self._pids)
        waiting = list(enumerate(jobs))
        running: dict[int, _Running] = {}
        results: dict[int, list[Any]] = {}
        while waiting or running:
            while waiting and waiting[0][1][0] <= len(free):
                index, (size, function, *arguments) = waiting.pop(0)
                members, free = free[:size], free[size:]
                store = _send(members, function, arguments)
                running[index] = _Running(members, store, time.monotonic() + timeout_s)
            self._collect(running)
            for index in [i for i, job in running.items() if len(job.answers) == len(job.members)]:
                job = running.pop(index)
                free.extend(job.members)
                results[index] = [job.answers[rank][1] for rank in range(len(job.members))]
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Let every worker end, by force where one does not."""
        for connection in self._pids:
            connection.close()
        self._pids = {}
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        pipes = [Pipe() for _ in range(self.size)]
        theirs = [theirs.fileno() for _, theirs in pipes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "worker.py"), *map(str, theirs)],
            env=environment,
            pass_fds=theirs,
            stderr=self._log,
            stdout=self._log,
            start_new_session=True,
        )
        for _, connection in pipes:
            connection.close()
        try:
            self._pids = {ours: ours.recv() for ours, _ in pipes}
        except EOFError:
            self._fail("the workers did not start")

    def _collect(self, running: dict[int, _Running]) -> None:
        """Take in what has been answered within a second."""
        owner = {c: (job, rank) for job in running.values() for rank, c in enumerate(job.members)}
        for connection in wait([c for c, (job, rank) in owner.items() if rank not in job.answers], timeout=1.0):
            assert isinstance(connection, Connection)
            job, rank = owner[connection]
            try:
                job.answers[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                job.answers[rank] = ("error", "the process died")
            if job.answers[rank][0] == "error":
                self._fail(f"rank {rank} of {len(job.members)}: {job.answers[rank][1]}")
        for job in running.values():
            if time.monotonic() > job.deadline:
                missing = [rank for rank in range(len(job.members)) if rank not in job.answers]
                for rank in missing:
                    os.kill(self._pids[job.members[rank]], signal.SIGUSR1)
                time.sleep(0.5)
                self._fail(f"ranks {missing} of {len(job.members)} did not end in time")

    def _fail(self, text: str) -> None:
        self._log.seek(0)
        output = self._log.read().decode(errors="replace")[-4000:]
        self.close()
        pytest.fail(f"{text}\n--- output of the workers ---\n{output}", pytrace=False)


def _send(members: Sequence[Connection], function: Callable[..., Any], arguments: Sequence[Any]) -> TCPStore:
    """Give every member its rank and task; the ranks meet at a store that outlives them, as torchrun's does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": len(members), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for rank, connection in enumerate(members):
        environment = {k: str(v) for k, v in {**world, **agent, "RANK": rank, "LOCAL_RANK": rank}.items()}
        connection.send((environment, function.__code__.co_filename, function.__qualname__, list(arguments)))
    return store


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """``pool.run(size, function, *arguments)``; see :class:`WorkerPool`."""
    made = WorkerPool()
    yield made
    made.close()
