"""Who is to blame for a collective that failed: processes that are gone, stopped or silent, by their logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fedsim.base.errors import JudgeError
from fedsim.base.journal import Journal, log_file
from fedsim.base.processes import state_of
from fedsim.parallel.blame import LOST, TIMED_OUT, blame, cause_of


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as started:
        yield started
        started.kill()


def log(folder: Path, rank: int, pid: int, *events: str) -> None:
    """A rank's log, in round 3 of client 7."""
    journal = Journal(rank)
    journal.open(folder)
    with journal.at(stage="local training", round=3, client=7):
        for event in events:
            journal.write(event)
    journal.close()
    path = log_file(folder, rank)
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {pid}'))


def test_states_of_a_process(process: subprocess.Popen[bytes]) -> None:
    assert state_of(process.pid) == "alive"
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(process.pid) == "stopped"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(process.pid) == "gone", "a zombie is dead"
    process.wait()
    assert state_of(process.pid) == "gone"


def test_the_dead_come_before_the_silent(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    log(tmp_path, 1, process.pid)
    silent = blame(tmp_path, [1], 9.0, notice_s=0)
    assert silent is not None and silent.text.startswith(
        "rank 1 did not answer for 9 s (parallel.timeout_s), last seen in local training, round 3, client 7"
    )
    assert blame(tmp_path, [1], None, notice_s=0) is None, "nobody has waited"
    log(tmp_path, 2, 2**22 + 1)  # above the kernel's largest process id
    found = blame(tmp_path, [1, 2], 9.0, notice_s=0)
    assert found is not None and found == blame(tmp_path, [1, 2], None, notice_s=0)
    assert found.text.startswith("rank 2 ended without a word (killed?), last seen in local training")
    assert "rank 1" not in found.text
    assert found.place == {"rank": 2, "stage": "local training", "round": 3, "client": 7}


@pytest.mark.parametrize("event", ["error", "stopped", LOST, TIMED_OUT])
def test_who_has_spoken_or_waits_is_not_to_blame(tmp_path: Path, event: str) -> None:
    log(tmp_path, 1, 2**22 + 1, event)
    assert blame(tmp_path, [1, 5], 9.0, notice_s=0) is None, "nor is one without a log"


def test_causes_by_the_transports_words() -> None:
    gloo = "[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"
    assert cause_of(RuntimeError(gloo)) == LOST
    late = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv operation to complete"
    assert cause_of(RuntimeError(late)) == TIMED_OUT
    assert cause_of(dist.DistNetworkError("The client socket has timed out after 300000ms; store")) == TIMED_OUT
    assert cause_of(RuntimeError("the loss became NaN")) is None and cause_of(ValueError(gloo)) is None
    assert cause_of(RuntimeError("CUDA out of memory in peer")) is None
    assert cause_of(JudgeError("the store: connection reset by peer")) is None, (
        "fedsim's own errors have their own words"
    )
