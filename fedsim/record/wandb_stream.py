"""Weights & Biases, in a process of its own: the run tells it which rounds count, and can always do without it.

The child (``fedsim/record/wandb_worker.py``) takes everything that it sends from the run directory. Whatever happens
to it (wandb is missing, asks for a login, hangs, crashes) the run learns from its exit and says so in one line; it
never waits for it before the end, and then for a bounded time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedsim.base.rounds import round_number
from fedsim.config import Config, to_nested

LIMIT_S = {"offline": 20.0, "online": 60.0}
"""Longest wait at the end of a run for what was not written or sent so far; also W&B's own limit for its start.

Never more than half of ``parallel.timeout_s``: the other ranks wait for rank 0 in a collective with that limit.
"""

ABORT_S = 5.0
"""The same where the run was stopped by an error."""

LOGIN = frozenset(f"WANDB_{name}" for name in (
    "API_KEY", "BASE_URL", "ENTITY", "IDENTITY_TOKEN_FILE", "CREDENTIALS_FILE", "INSECURE_DISABLE_SSL", "HTTP_PROXY",
    "HTTPS_PROXY", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"))  # fmt: skip
"""Variables of wandb's that reach it: who is logged in, how to get to the server, and where wandb keeps its own files.

wandb takes any of its settings from ``WANDB_…``: the id and project of the run (those of a sweep's agent go before what
the program says), its mode, group, name, tags and notes. Those would put the run where its configuration does not.
"""


class WandbStream:
    """The run's end of the stream; rank 0 holds it.

    The configuration decides whether and where to: of the environment's ``WANDB_…`` only :data:`LOGIN` reaches wandb,
    and ``WANDB_ENTITY`` counts only where ``wandb.entity`` is empty. A run under a sweep's agent is not in the sweep.

    W&B takes no step back: where a round that it has is done anew (its checkpoint was damaged), it keeps the first
    version's figures, while ``metrics.jsonl`` has the second's; outside exact mode they may differ by more than times.

    Args:
        folder: the run directory.
        config: of the run.
        say: hears the one line about a failure.
    """

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.config = config
        self._say = say
        self._enabled = config.wandb.mode != "off"
        self._limit_s = min(LIMIT_S.get(config.wandb.mode, 0.0), config.parallel.timeout_s / 2)
        self._process: subprocess.Popen[str] | None = None

    @property
    def place(self) -> str | None:
        """Where the run is, and how it gets to the server; None where nothing is streamed."""
        runs = self.folder / "wandb"
        if not self._enabled or (self._process is None and not runs.is_dir()):
            return None
        if self.config.wandb.mode == "online":
            return f"{runs} (sent as it goes)"
        if any(runs.glob("run-*")):  # of an online session; whether all of it was sent, W&B knows
            return f"{runs} (to send it, with what was online: cd {self.folder} && wandb sync --include-online)"
        return f"{runs} (to send it: wandb sync {runs}/offline-run-*)"

    def forget(self) -> None:
        """The run directory is used for a new run: it gets an id of its own."""
        (self.folder / "wandb.json").unlink(missing_ok=True)

    def finished(self, round_idx: int) -> None:
        """Everything up to this round counts (its checkpoint is on disk): stream what has not been."""
        self._send({"round": round_number(round_idx)})

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the stream, with the run's summary if it came to its end; without one, W&B shows the run as failed."""
        if self._process is not None and summary is not None:
            self._send({"summary": dict(summary)})
        process, self._process = self._process, None
        if process is None:
            return
        limit = min(ABORT_S, self._limit_s) if summary is None else self._limit_s
        try:
            answer, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self._fail(f"did not end in time ({limit:g} s)")
            return
        if process.returncode != 0:
            self._fail(_reason(answer, process.returncode))

    def _send(self, message: Mapping[str, Any]) -> None:
        """Pass a message to the child, which the first one starts; a child that has ended is reported."""
        if not self._enabled:
            return
        try:
            if self._process is None:
                self._process = self._start()
            self._write(self._process, message)
        except OSError as error:  # no process can be made; or it has ended, or hangs and its pipe is full
            self._fail(self._end(str(error)))

    def _end(self, reason: str) -> str:
        """End the child, and say why it has not worked."""
        process, self._process = self._process, None
        if process is None:
            return reason
        if process.poll() is None:
            process.kill()
        answer, _ = process.communicate()
        return _reason(answer, process.returncode)

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(__file__).parents[2])
        known = os.environ.get("PYTHONPATH")
        environment = {name: v for name, v in os.environ.items() if name in LOGIN or not name.startswith("WANDB_")}
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedsim.record.wandb_worker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C ends the run, which then ends the stream
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # a child that hangs may fill the pipe: no reason to wait
        settings = {**asdict(self.config.wandb), "name": self.config.name, "limit_s": self._limit_s}
        self._write(process, {"settings": settings, "config": config_to_send(self.config)})
        return process

    @staticmethod
    def _write(process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()

    def _fail(self, reason: str) -> None:
        self._enabled = False
        self._say(f"W&B: {reason}; the run goes on without it (its metrics are in metrics.jsonl)")


def _reason(answer: str, code: int) -> str:
    if code == -signal.SIGALRM:  # its own limit, which began a moment before ours
        return "did not end in time"
    lines = answer.strip().splitlines()
    return lines[-1] if lines else f"its process ended with status {code}"


def config_to_send(config: Config) -> dict[str, Any]:
    """The configuration without options of attacks, which may hold texts of replies."""
    return to_nested(replace(config, attacks=[replace(attack, options={}) for attack in config.attacks]))
