"""The run directory: resolved config, manifest, metrics, checkpoints and live output of one run.

Every rank holds one, so that all take the same branches; only rank 0 writes and prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import yaml

from fedsim.base.errors import CheckpointError, ConfigError
from fedsim.base.exit_file import forget_ending, write_ending
from fedsim.base.journal import Journal
from fedsim.base.ranks import Ranks
from fedsim.base.rounds import round_number
from fedsim.base.version import SIGNATURE, made_by, maker
from fedsim.config import Config, to_nested
from fedsim.federation.algorithms import ServerState, build_algorithm
from fedsim.federation.client_state import ClientStateStore
from fedsim.record.checkpoint import Checkpoint, CheckpointStore
from fedsim.record.folders import check_folder
from fedsim.record.lock import DirectoryLock
from fedsim.record.manifest import add_note
from fedsim.record.metrics import MetricLog, read_rows
from fedsim.record.progress import Phase, Progress
from fedsim.record.sameness import compare
from fedsim.record.timers import PhaseTimers
from fedsim.record.wandb_stream import WandbStream

SIGNED = ("adapter", "answers", "items", "guard")
"""Folders of results that are of use by themselves; each names the fedsim that finished it."""


class RunRecord:
    """One run's directory and its live output.

    Args:
        config: the run's configuration.
        ranks: to agree on what is there.
        synchronize: wait for the GPU at phase ends.
        journal: this rank's log, opened once the directory is this run's.

    Attributes:
        is_finished: all rounds are done, and the checkpoints were removed since: there is nothing
            to do. Known after :meth:`claim` or :meth:`check_directory`.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        synchronize: bool,
        journal: Journal | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.journal = Journal(ranks.rank) if journal is None else journal
        self.folder = config.folder
        self.progress = Progress(sys.stderr, enabled=ranks.is_main)
        self.timers = PhaseTimers(synchronize)
        keep = config.record.keep_checkpoints
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", keep)
        self.client_state = self.folder / "client_state"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.notes: list[str] = []
        self.is_finished = False
        self.stream = WandbStream(self.folder, config, self.progress.note)
        self._lock = DirectoryLock(self.folder)

    def claim(self) -> None:
        """Take the run directory for this process until :meth:`release`.

        Raises:
            ConfigError, CheckpointError: as :meth:`check_directory`, or another process holds it.
        """
        self.is_finished = self.ranks.once(self._claim)
        self._lock.join()
        self.journal.open(self.folder)

    def check_directory(self) -> None:
        """Check that the run may use its directory; nothing is written.

        Raises:
            ConfigError: it holds a run with another configuration, exists and may not be resumed,
                or cannot be made.
            CheckpointError: it holds checkpoints, but not all that belongs to them; or its
                metrics.jsonl is damaged.
        """
        self.is_finished = self.ranks.once(lambda: self._check_directory(self._is_taken()))

    def resume(self, check: Callable[[ServerState], None]) -> Checkpoint | None:
        """Load the last whole checkpoint, the same on every rank, and drop metric rows after it.

        Args:
            check: raises CheckpointError for a state that the run cannot go on from.

        Returns:
            None where no round was finished.
        """
        newest = self.ranks.once(lambda: self._newest(check))
        # Every rank reads the checkpoint that rank 0 has checked.
        if newest is None:
            return None
        self.counts(newest)
        return self.checkpoints.read(newest)

    def counts(self, round_idx: int) -> None:
        """Stream a round's figures to W&B: its checkpoint is on disk, so that they are final."""
        if self.ranks.is_main:
            self.stream.finished(round_idx)

    def append(self, round_idx: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Write one row of metrics.jsonl."""
        if self.ranks.is_main:
            MetricLog(self.metrics_file).append(round_idx, stage, metrics)

    @contextmanager
    def phase(self, name: str, timer: str, unit: str = "") -> Iterator[Phase]:
        """Time a phase, with a progress line and lines in the log.

        Args:
            timer: name of the phase in the metrics ``time/…_s``.
            unit: of its pieces of work.
        """
        with (
            self.journal.at(stage=name),
            self.timers.phase(timer),
            self.progress.phase(name, 0, unit) as shown,
        ):
            yield shown

    @contextmanager
    def round(self, round_idx: int, num_rounds: int) -> Iterator[None]:
        """Name a round in the progress lines and the log."""
        self.progress.round(round_idx, num_rounds)
        with self.journal.at(round=round_number(round_idx)):
            yield

    def finished(self) -> None:
        """Write exit.json: all rounds are done."""
        if self.ranks.is_main:
            write_ending(self.folder, "finished", 0, "all rounds are done", {"rank": 0})

    def header(self, arm: str, num_ranks: int, device: torch.device, backend: str) -> None:
        """Print the run's configuration and place in a few lines.

        Args:
            arm: name of the combination of methods.
            backend: of the sums over processes, in words.
        """
        config = self.config
        algorithm = build_algorithm(config.federation, config.server_optimizer)
        who = algorithm.participation(config.federation, config.seed)
        steps = f"{who.num_steps(config.local.steps)} local steps"
        # Arithmetic of the sums over clients and processes.
        sums = "floating point"
        if config.parallel.exact:
            sums = "exact (bit-identical for any number of processes)"
        if num_ranks > 1:
            sums += f", over {backend}"
        facts = {
            "arm": arm,
            "model": config.model.path,
            "clients": who.words(),
            "schedule": f"{config.federation.num_rounds} rounds x {steps}",
            "processes": f"{num_ranks} on {device.type}, {config.parallel.threads} thread(s) each",
            "sums": sums,
            "directory": str(self.folder),
        }
        self.progress.header(f"{maker(made_by())}: run {config.name}", facts)

    def say(self, text: str) -> None:
        """Print one line of progress, and log it."""
        self.progress.note(text)
        self.journal.write("note", text=text)

    def note(self, text: str) -> None:
        """Print one line of progress, and keep it in the manifest; called on every rank."""
        self.say(text)
        if self.ranks.is_main:
            add_note(self.folder / "manifest.json", text)

    def _claim(self) -> bool:
        """Make the directory, or check that it holds this very run.

        One without a checkpoint begins at round 1.

        Returns:
            :attr:`is_finished`; then nothing was changed.
        """
        was_taken = self._is_taken()  # before this very call writes into it
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.hold(self.say)
        except OSError as error:
            raise ConfigError(
                f"record.dir={self.config.record.dir!r}: {self.folder} cannot be made or written "
                f"({error.strerror}); give another directory"
            ) from error
        # From here on no other run writes into the directory.
        if self._check_directory(was_taken):
            return True
        forget_ending(self.folder)
        if self.checkpoints.any():
            return False
        # No round was finished: remove what an earlier session says about itself.
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for part in SIGNED:
            (self.folder / part / SIGNATURE).unlink(missing_ok=True)
        self.stream.forget()
        self.write_config()
        return False

    def _is_taken(self) -> bool:
        """Return whether the folder exists and holds something."""
        setting = f"record.dir={self.config.record.dir!r}, name={self.config.name!r}"
        check_folder(self.folder, setting)
        return self.folder.is_dir() and any(self.folder.iterdir())

    def _check_directory(self, is_taken: bool) -> bool:
        """As :meth:`check_directory`; returns :attr:`is_finished`."""
        if is_taken and self.config.record.resume == "never":
            fix = "remove it, or give the run another name (name=...)"
            raise ConfigError(f"record.resume=never: {self.folder} exists; {fix}")
        # A run with checkpoints is resumed.
        if self.checkpoints.any():
            for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
                if not (self.folder / name).is_file():
                    raise CheckpointError(
                        f"{self.folder}: holds checkpoints, but no {name} of their run; put it "
                        "back, or give this run another name (name=...)"
                    )
            self._check_same()
            return False
        # One without is finished, or begins with round 1.
        num_done = self._num_recorded()
        if num_done == 0:
            return False
        self._check_same()
        if self._has_results(num_done):
            return True
        self.say(
            f"no checkpoint is left of the {num_done} round(s) in {self.folder}: the run begins "
            "again with round 1 and overwrites what it has written there"
        )
        return False

    def _num_recorded(self) -> int:
        """Count the rounds that metrics.jsonl has a row of."""
        if not self.metrics_file.is_file():
            return 0
        rows = read_rows(self.metrics_file, allow_torn_end=True)
        return len({row["round"] for row in rows if row["stage"] == "round"})

    def _has_results(self, num_done: int) -> bool:
        """Return True for a finished run: its adapter is signed, and its summary written last."""
        files = ["manifest.json", "summary.md"]
        files += [f"adapter/{SIGNATURE}", "adapter/adapter_model.safetensors"]
        is_whole = all((self.folder / name).is_file() for name in files)
        return is_whole and num_done == self.config.federation.num_rounds

    def release(self) -> None:
        """End the stream and release the locks of the directory."""
        self.stream.close()
        self._lock.release()

    def write_config(self) -> None:
        """Write config.yaml on rank 0: the keys of the run's last session, with its paths."""
        path = self.folder / "config.yaml"
        partial = path.with_suffix(".partial")
        text = yaml.safe_dump(to_nested(self.config), sort_keys=False)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    def _check_same(self) -> None:
        """Check that the directory's run is this one; print files and models that lie elsewhere."""
        path = self.folder / "config.yaml"
        try:
            found = compare(self.folder, self.config)
        except ConfigError as error:
            fix = f"remove {self.folder} to start again"
            raise CheckpointError(f"{path}: cannot be read ({error}); {fix}") from error
        if found.changed:
            changed = "; ".join(found.changed[:5])
            raise ConfigError(
                f"{self.folder} holds a run with another configuration ({changed}); give this run "
                "another name (name=...), or remove the directory"
            )
        for words in found.moved:
            self.say(f"{words}: the same content (SHA-256)")

    def _newest(self, check: Callable[[ServerState], None]) -> int | None:
        """Find the index of the last whole checkpoint's round, and drop metric rows after it."""

        def check_all(checkpoint: Checkpoint) -> None:
            check(checkpoint.state)
            control_variates = ClientStateStore(self.client_state)
            control_variates.check(checkpoint.client_rounds, checkpoint.state.adapter.numel())

        checkpoint = self.checkpoints.load(self.say, check_all)
        # The pretrained model's rows are written again when no round was finished.
        newest = None if checkpoint is None else checkpoint.round_idx
        MetricLog(self.metrics_file).truncate_after(newest)
        return newest
