"""Runs of a study: unfinished ones are started, several at once where asked for.

Every run is a command of its own, so that a study computes the same as ``fedsim run``, and a run
that fails ends no other. A study that is started again goes on where it was.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from fedsim.base.artefacts import digest_of
from fedsim.base.errors import ConfigError, RunError
from fedsim.base.processes import family, kill
from fedsim.base.tables import duration
from fedsim.config import Config, load_config, to_flat
from fedsim.parallel.signals import GRACE_S, heard
from fedsim.record.groups import decides
from fedsim.record.sameness import compare

_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: the run's name, unique in the study.
        seed: the run's seed; cells that differ only in ``labels`` are paired by it.
        labels: values that the study varies: column → value, for tables and files.
        settings: configuration keys that the cell sets, dotted, on top of the study's.
    """

    name: str
    seed: int
    labels: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """Settings with which the cells of a study are run.

    Attributes:
        study: name of the study; also W&B's tag and the folder of its runs under ``record.dir``.
        config: the configuration file that all cells build on.
        overrides: ``key=value`` words for all cells, in order.
        num_processes: of each run.
        num_jobs: runs at once.
        entry: arguments of python, or of torchrun, that start a run: ``-m fedsim run``.
    """

    study: str
    config: Path
    overrides: Sequence[str]
    num_processes: int
    num_jobs: int
    entry: Sequence[str]

    @property
    def folder(self) -> Path:
        """Folder of the study's runs, tables and logs."""
        return load_config(self.config, self.overrides).folder.with_name(self.study)

    def words(self, cell: Cell) -> list[str]:
        """The ``key=value`` words of a cell: the user's first, the cell's own last."""
        given = load_config(self.config, self.overrides)
        own: dict[str, Any] = {
            **cell.settings,
            "name": cell.name,
            "seed": cell.seed,
            "record.dir": str(self.folder),
            "wandb.group": given.wandb.group or self.group(cell),
            "wandb.tags": [*given.wandb.tags, self.study, f"seed-{cell.seed}"],
        }
        return [*self.overrides, *words_of(own)]

    def group(self, cell: Cell) -> str:
        """W&B's group of the cell's seeds, such as ``table1 · FedAvg · FL + filter · 0a1b2c3d``.

        Its end is a digest of the configuration without seed and places, so that a study that is
        run again with other settings has groups of its own.
        """
        words = [*self.overrides, *words_of(cell.settings)]
        config = to_flat(load_config(self.config, words))
        deciding = {key: value for key, value in config.items() if decides(key)}
        labels = [label for label in cell.labels.values() if label]
        return " · ".join([self.study, *labels, digest_of(deciding)[:8]])

    def resolved(self, cell: Cell) -> Config:
        """The cell's whole configuration.

        Raises:
            ConfigError: a key or value that a run would refuse.
        """
        return load_config(self.config, self.words(cell))

    def command(self, cell: Cell) -> list[str]:
        """The command that runs the cell."""
        launcher = [sys.executable]
        if self.num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher.append(f"--nproc_per_node={self.num_processes}")
        return [*launcher, *self.entry, str(self.config), *self.words(cell)]


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    words = []
    for key, value in settings.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
        text = text.strip().removesuffix("...").strip()  # YAML ends a bare value with "..."
        words.append(f"{key}={text}")
    return words


def is_finished(config: Config) -> bool:
    """Return whether the run of this configuration has ended, its summary being its last file.

    Raises:
        ConfigError: its folder holds a run of another configuration.
    """
    folder = config.folder
    if not (folder / "summary.md").is_file():
        return False
    changed = compare(folder, config).changed
    if changed:
        raise ConfigError(
            f"{folder}: holds a finished run of another configuration ({'; '.join(changed[:5])}); "
            "remove it, or give this study another directory (record.dir=...)"
        )
    return True


def run_cells(cells: Sequence[Cell], launch: Launch, say: Callable[[str], None]) -> dict[str, Path]:
    """Run what is not finished yet.

    The first cell of each seed runs before the others of that seed: it computes the artefacts that
    they share.

    Args:
        cells: in the order in which they are to run.
        launch: settings of the runs.
        say: called with a line for every cell that ends.

    Returns:
        The run directory of every cell, by name.

    Raises:
        ConfigError: two cells of one name, a configuration that a run would refuse, or a directory
            that holds another.
        RunError: cells failed; the others have run.
    """
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names), "cells need names of their own"
    configs = {cell.name: launch.resolved(cell) for cell in cells}
    folders = {name: config.folder for name, config in configs.items()}
    waiting = [cell for cell in cells if not is_finished(configs[cell.name])]
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished already")
    _Pool(launch, folders, say).run(waiting)
    return folders


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    started: float


class _Pool:
    """Runs cells as processes, a few at a time."""

    def __init__(
        self,
        launch: Launch,
        folders: Mapping[str, Path],
        say: Callable[[str], None],
    ) -> None:
        self.launch = launch
        self.folders = folders
        self.say = say
        self.running: list[_Job] = []
        self.failed: dict[str, str] = {}
        self.num_done = 0

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells to their end.

        Raises:
            RunError: cells failed; the others have run.
        """
        waiting = list(cells)
        begun: set[int] = set()  # seeds whose first cell has ended
        started = time.monotonic()

        # No run outlives the study: on these signals, too, the finally block below ends them.
        before = {}
        for number in heard((signal.SIGTERM, signal.SIGHUP)):
            before[number] = signal.signal(number, _leave)
        try:
            while waiting or self.running:
                # A cell may start unless its seed's first cell is still running.
                busy = {job.cell.seed for job in self.running if job.cell.seed not in begun}
                ready = next((cell for cell in waiting if cell.seed not in busy), None)
                if ready is not None and len(self.running) < self.launch.num_jobs:
                    waiting.remove(ready)
                    self.running.append(self._start(ready))
                    continue
                time.sleep(_POLL_S)
                begun |= self._collect(len(cells), started)
        finally:
            _end([job.process for job in self.running])
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.failed:
            first = list(self.failed.items())[:3]
            reasons = "; ".join(f"{name}: {why}" for name, why in first)
            failed = f"{len(self.failed)} of {len(cells)} runs failed"
            raise RunError(
                f"{failed} ({reasons}); mend the cause, and the same command goes on",
            )

    def _start(self, cell: Cell) -> _Job:
        log = self.folders[cell.name].parent / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.launch.command(cell),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a launcher is ended with its ranks
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        return _Job(cell, process, log, time.monotonic())

    def _collect(self, total: int, started: float) -> set[int]:
        """Take ended jobs out; returns the seeds whose first cell has ended."""
        ended = [job for job in self.running if job.process.poll() is not None]
        for job in ended:
            self.running.remove(job)
            self.num_done += 1
            taken = duration(time.monotonic() - job.started)
            mean_s = (time.monotonic() - started) / self.num_done
            left_s = mean_s * (total - self.num_done)

            # A line for the job, with the error of one that failed.
            head = f"{self.num_done}/{total} {job.cell.name}"
            if job.process.returncode != 0:
                why = _last_error(job.log, job.process.returncode)
                self.failed[job.cell.name] = why
                self.say(f"{head}: failed after {taken}: {why} (log: {job.log})")
            elif left_s > 0:
                self.say(f"{head}: finished in {taken}, about {duration(left_s)} left")
            else:
                self.say(f"{head}: finished in {taken}")
        return {job.cell.seed for job in ended}


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _last_error(log: Path, status: int) -> str:
    """Last error line of a failed run's log; without one its last line, or the exit status."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return lines[-1] if lines else f"exit status {status}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End runs with all their ranks, which a launcher starts in sessions of their own."""
    everyone = list(itertools.chain.from_iterable(family(process.pid) for process in processes))

    # SIGTERM, time to leave, then SIGKILL.
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_S + 15
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(until - time.monotonic(), 0))
    kill(everyone)
