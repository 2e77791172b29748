"""Signals and restarts of real launches: SIGTERM stops between rounds, SIGSTOP is found out, torchrun restarts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.exit_file import read_ending
from fedsim.base.journal import last_seen, read_log
from tools.chaos.outcome import different, outcome

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
SHORT = ["guard.kind=none", "cai.iterations=0", "federation.num_rounds=4", "federation.algorithm=scaffold",
         "eval.limit=1", "eval.every=4", "eval.xstest=", "eval.helpful=", "eval.guard_judge=none"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Launch:
    """``launch/run.py`` in a folder of its own."""

    def __init__(self, folder: Path, launcher: list[str], *words: str) -> None:
        self.run = folder / "small"
        self.log = folder / "terminal"
        places = [f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}"]
        command = [sys.executable, *launcher, "launch/run.py", str(SMALL), *SHORT, *words, *places]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.stream = self.log.open("w")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.stream, stderr=self.stream, start_new_session=True
        )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, seen: Callable[[], Any], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not seen():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.01)

    def in_round(self, number: int) -> bool:
        return bool(re.search(rf"round {number}/\d+ · local training", self.text))

    def wait(self, seconds: float) -> float:
        """Seconds until it has ended."""
        began = time.monotonic()
        try:
            self.process.wait(timeout=seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.stream.close()
        return time.monotonic() - began


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run, on one process."""
    folder = tmp_path_factory.mktemp("straight")
    launch = Launch(folder, [])
    launch.wait(180)
    assert launch.process.returncode == 0, launch.text[-3000:]
    note = read_ending(launch.run)
    assert note is not None and (note["reason"], note["status"]) == ("finished", 0)
    return outcome(launch.run, folder / "artefacts")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.deep)])
def test_a_signal_stops_between_two_rounds(tmp_path: Path, straight: dict[str, Any], number: int) -> None:
    launch = Launch(tmp_path, [])
    launch.until(lambda: launch.in_round(1))
    launch.process.send_signal(number)
    assert launch.wait(60) < 30
    name = signal.Signals(number).name
    assert launch.process.returncode == 128 + number
    (line,) = [line for line in launch.text.splitlines() if line.startswith(("stopped:", "error:"))]
    assert re.match(rf"stopped: {name} came; \d of 4 rounds are done", line) and "Traceback" not in launch.text
    note = read_ending(launch.run)
    assert note is not None and (note["reason"], note["status"], note["message"]) == ("stopped", 128 + number, line)
    again = Launch(tmp_path, [])
    again.wait(120)
    assert again.process.returncode == 0 and "resumed after round" in again.text
    assert different(outcome(again.run, tmp_path / "artefacts"), straight) == []


@pytest.mark.deep
def test_torchrun_restarts_after_a_rank_was_killed(tmp_path: Path, straight: dict[str, Any]) -> None:
    launch = Launch(tmp_path, [*TORCHRUN, "--max-restarts=2"])
    launch.until(lambda: launch.in_round(2))
    os.kill(last_seen(launch.run, 1).pid, signal.SIGKILL)
    launch.wait(180)
    assert launch.process.returncode == 0, launch.text[-3000:]
    (line,) = [line for line in launch.text.splitlines() if line.startswith("error:")]
    assert re.match(r"error: rank 1 ended without a word \(killed\?\), last seen in ([a-z ]+, )?round \d", line)
    assert sum(record["event"] == "start" for record in read_log(launch.run / "logs" / "rank-001.jsonl")) == 2
    assert different(outcome(launch.run, tmp_path / "artefacts"), straight) == []


@pytest.mark.deep
def test_a_rank_that_is_stopped_is_found_out(tmp_path: Path) -> None:
    launch = Launch(tmp_path, TORCHRUN, "parallel.timeout_s=5")
    launch.until(lambda: launch.in_round(1))
    pid = last_seen(launch.run, 0).pid
    os.kill(pid, signal.SIGSTOP)
    launch.until(lambda: "error: " in launch.text, 40)
    os.kill(pid, signal.SIGKILL)  # torchrun would give a rank that does not listen 30 s
    launch.wait(60)
    assert launch.process.returncode != 0
    (line,) = [line for line in launch.text.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 0 is stopped (SIGSTOP?), last seen in"), line
    note = read_ending(launch.run)
    assert note is not None and (note["reason"], note["message"]) == ("lost rank", line)
