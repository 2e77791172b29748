"""Memory, open files and disk of a run while it goes, seen from outside: samples of its processes and its directory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from fedsim.base.processes import family, kill
from fedsim.record.metrics import NewRows

INTERVAL_S = 0.03
RESCAN_S = 1.0  # new processes appear when a run starts; looking for them costs more than a sample
#: What a run adds to on purpose: its logs, and what is kept of every evaluation. All else may not grow.
LOGS, EVALUATIONS = "logs", "evaluations"
WORKER, CORE = "W&B's worker", "wandb-core"


@dataclass(frozen=True)
class Sample:
    """One look at a run.

    Attributes:
        number: the last round with a row in metrics.jsonl, from 1.
        resident: bytes of resident memory, by process ("rank 0", "launcher", :data:`WORKER`, :data:`CORE`).
        handles: open file descriptors, likewise.
        files: number of files in the run directory, without those of evaluations.
        kept_bytes: bytes of those that are no logs: checkpoints, client state, what is written once.
        log_bytes: bytes of the logs.
        evaluation_bytes: bytes of what is kept of evaluations.
    """

    number: int
    resident: Mapping[str, int]
    handles: Mapping[str, int]
    files: int
    kept_bytes: int
    log_bytes: int
    evaluation_bytes: int


def watch(
    command: Sequence[str],
    folder: Path,
    log: IO[bytes],
    *,
    environment: Mapping[str, str] | None = None,
    limit_s: float,
    interval_s: float = INTERVAL_S,
    say: Callable[[int], None] = lambda number: None,
) -> tuple[int | None, list[Sample]]:
    """Run a command to its end and look at it every ``interval_s`` from the first round on.

    Args:
        command: of one process, or of a launcher whose children are the ranks.
        folder: the run directory.
        log: takes the command's output.
        limit_s: the command and its children are killed after so long.
        say: hears the number of each round that ends.

    Returns:
        The exit status, None after ``limit_s``; and the samples, oldest first.
    """
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    family, log_of_rounds, number = Family(process.pid), NewRows(folder / "metrics.jsonl"), 0
    samples: list[Sample] = []
    deadline = time.monotonic() + limit_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(interval_s)
            for row in log_of_rounds.read():
                if row["stage"] == "round":
                    number = row["round"]
                    say(number)
            if number == 0:
                continue
            resident, handles = family.look()
            samples.append(Sample(number, resident, handles, *disk_use(folder)))
        return process.poll(), samples
    finally:
        family.end()
        process.wait()


class Family:
    """A process and its descendants, by what they are.

    Ranks are what a launcher starts, or the command itself where it starts none. W&B's worker is fedsim's own process,
    wandb-core W&B's program that it starts.
    """

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self._names: dict[psutil.Process, str] = {}
        self._due = 0.0

    def look(self) -> tuple[dict[str, int], dict[str, int]]:
        """Resident bytes and open file descriptors, by entry."""
        if time.monotonic() >= self._due:
            self._find()
        resident: dict[str, int] = {}
        handles: dict[str, int] = {}
        for process, name in list(self._names.items()):
            try:
                size, count = process.memory_info().rss, process.num_fds()
            except psutil.Error:  # it has ended
                del self._names[process]
                continue
            resident[name] = resident.get(name, 0) + size
            handles[name] = handles.get(name, 0) + count
        return resident, handles

    def end(self) -> None:
        """Kill whatever is left of them."""
        kill(family(self.root.pid))

    def _find(self) -> None:
        self._due = time.monotonic() + RESCAN_S
        try:
            below = self.root.children(recursive=True)
            ranks = {child: rank for child in below if (rank := _rank(child, self.root)) is not None}
            self._names = {self.root: "launcher" if ranks else "rank 0"}
            self._names |= {child: f"rank {rank}" for child, rank in ranks.items()}
            self._names |= {child: _name(child) for child in below if child not in ranks}
        except psutil.Error:  # one has ended while it was asked: the next look finds the others
            self._due = 0.0


def _rank(child: psutil.Process, launcher: psutil.Process) -> str | None:
    """The rank that a launcher gave to its child; None for other processes."""
    if child.ppid() != launcher.pid or "RANK" in launcher.environ():
        return None
    return child.environ().get("RANK")


def _name(child: psutil.Process) -> str:
    words = child.cmdline()
    if "fedsim.record.wandb_worker" in words:
        return WORKER
    return CORE if any(CORE in word for word in words[:1]) else "others"


def disk_use(folder: Path) -> tuple[int, int, int, int]:
    """Number of files without evaluations', and bytes kept, of logs and of evaluations; what vanishes counts not."""
    count, sizes = 0, {"": 0, LOGS: 0, EVALUATIONS: 0}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            kind = kind_of(path.relative_to(folder))
            try:
                sizes[kind] += path.stat().st_size
            except FileNotFoundError:
                continue
            count += kind != EVALUATIONS
    return count, sizes[""], sizes[LOGS], sizes[EVALUATIONS]


def kind_of(path: Path) -> str:
    """:data:`LOGS`, :data:`EVALUATIONS`, or "" for a file of a run directory, by its relative path."""
    if path.parts[0] in ("items", "answers"):
        return EVALUATIONS
    if path.parts[0] in ("wandb", "logs") or path.suffix in (".jsonl", ".log"):
        return LOGS
    return ""
