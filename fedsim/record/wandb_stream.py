"""Stream of a run's figures to Weights & Biases, which no run depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedsim.base.rounds import round_number
from fedsim.config import Config, to_nested

LIMIT_S = {"offline": 20.0, "online": 60.0}
"""Seconds: longest wait at the end of a run, and W&B's own limit for its start.

Never more than half of ``parallel.timeout_s``: the other ranks wait for rank 0 in a collective with
that limit.
"""

ABORT_S = 5.0
"""Seconds: longest wait where the run was stopped by an error."""

LOGIN = frozenset(f"WANDB_{name}" for name in (
    "API_KEY", "BASE_URL", "ENTITY", "IDENTITY_TOKEN_FILE", "CREDENTIALS_FILE",
    "INSECURE_DISABLE_SSL", "HTTP_PROXY", "HTTPS_PROXY", "CACHE_DIR", "CONFIG_DIR",
    "DATA_DIR"))  # fmt: skip
"""Variables that reach wandb: the login, the way to the server, and the place of wandb's own files.

Others, such as those of a sweep's agent, would give the run another id, project or mode than its
configuration.
"""


class WandbStream:
    """Rank 0's end of the stream: passes the rounds that count to a child process.

    It waits for the child only at the end. wandb runs in a child, although its own service has a
    process already: in the calling process it imports and starts for seconds, asks for a login on
    the terminal, cannot be ended where it hangs (nor can the exit), reads all of ``WANDB_…``, adds
    to it, and replaces ``sys.exit`` and ``sys.excepthook``.

    A step that W&B has is final: of a round that is repeated (its checkpoint was damaged) W&B keeps
    the first version's figures, while ``metrics.jsonl`` has the second's; outside exact mode they
    may differ by more than times.

    Args:
        folder: the run directory.
        config: of the run; its ``wandb`` section has mode and project. ``WANDB_ENTITY`` counts if
            ``wandb.entity`` is empty.
        say: is called with one line about a failure.
    """

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.config = config
        self._say = say
        self._enabled = config.wandb.mode != "off"
        self._limit_s = LIMIT_S.get(config.wandb.mode, 0.0)  # seconds
        self._limit_s = min(self._limit_s, config.parallel.timeout_s / 2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def place(self) -> str | None:
        """Folder of W&B's files, and the way to the server; None where nothing is streamed."""
        runs = self.folder / "wandb"
        if not self._enabled or (self._process is None and not runs.is_dir()):
            return None
        if self.config.wandb.mode == "online":
            return f"{runs} (sent as it goes)"
        return f"{runs} (to send it: wandb sync --include-online {runs})"

    def forget(self) -> None:
        """Give the next session an id of its own: the run directory is used for a new run."""
        (self.folder / "wandb.json").unlink(missing_ok=True)

    def finished(self, round_idx: int) -> None:
        """Stream what is new up to this round, whose checkpoint is on disk."""
        self._send({"round": round_number(round_idx)})

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the stream.

        Args:
            summary: of a finished run; without one, W&B shows the run as failed.
        """
        if summary is None:
            self._end(min(ABORT_S, self._limit_s))
            return
        if self._process is not None:
            self._send({"summary": dict(summary)})
        self._end(self._limit_s)

    def _send(self, message: Mapping[str, Any]) -> None:
        """Pass a message to the child; the first one starts it."""
        if not self._enabled:
            return
        try:
            if self._process is None:
                self._process = self._start()
                run = {**asdict(self.config.wandb), "name": self.config.name}
                settings = config_to_send(self.config)
                self._write({"limit_s": self._limit_s, "run": run, "config": settings})
            self._write(message)
        except OSError as error:
            # No process can be made; or it has ended, or it hangs and its pipe is full.
            self._end(limit_s=1.0)
            if self._enabled:  # the child has not said why
                self._fail(str(error))

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the child process (:mod:`fedsim.record.wandb_worker`)."""
        environment = {}
        for name, value in os.environ.items():
            if name in LOGIN or not name.startswith("WANDB_"):
                environment[name] = value
        environment["WANDB_ERROR_REPORTING"] = "false"  # reports of wandb's errors to its maker
        # This fedsim, installed or not.
        root = str(Path(__file__).parents[2])
        others = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{others}" if others else root
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fedsim.record.wandb_worker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C ends the run, which then ends the stream
        )

    def _write(self, message: Mapping[str, Any]) -> None:
        """Write a line to the child.

        Raises:
            OSError: at once, where the child has ended or its pipe is full.
        """
        assert self._process is not None and self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        line = json.dumps(message).encode() + b"\n"
        if os.write(pipe, line) < len(line):
            raise BlockingIOError("its process takes nothing more")

    def _end(self, limit_s: float) -> None:
        """Wait for the end of the child for ``limit_s`` seconds, and report a failure."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            answer, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self._fail(f"did not end in time ({limit_s:g} s)")
            return
        if process.returncode != 0:
            reason = answer.decode().strip()
            self._fail(reason or f"its process ended with status {process.returncode}")

    def _fail(self, reason: str) -> None:
        """Report a failure, and stream nothing from then on."""
        self._enabled = False
        self._say(f"W&B: {reason}; the run goes on without it (its metrics are in metrics.jsonl)")


def config_to_send(config: Config) -> dict[str, Any]:
    """Return the configuration without options of user code, which may hold texts of prompts."""
    attacks = [replace(attack, options={}) for attack in config.attacks]
    benchmarks = [replace(benchmark, options={}) for benchmark in config.eval.benchmarks]
    return to_nested(
        replace(
            config,
            attacks=attacks,
            federation=replace(config.federation, options={}, partition_options={}),
            guard=replace(config.guard, options={}),
            eval=replace(config.eval, benchmarks=benchmarks, advbench_options={}),
            judge=replace(config.judge, options={}),
        )
    )
