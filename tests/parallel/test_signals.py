"""A wish to stop: noted at once, carried out at the latest after the grace, and handlers given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.base.exit_file import read_ending
from fedsim.base.journal import Journal, log_file
from fedsim.parallel.signals import StopRequest, signal_name

# A process that waits in one place, where no handler of Python's can run, and never comes to the end of a round;
# arguments: a folder, the grace, and the number of ranks, of which it is rank 0.
BUSY = """
import ctypes, sys
from pathlib import Path
from fedsim.parallel.exits import exit_now
from fedsim.parallel.signals import StopRequest
from fedsim.base.journal import Journal
stop, journal = StopRequest(), Journal()
journal.open(Path(sys.argv[1]))
stop.on_deadline = lambda number, at_once: exit_now(journal, number, int(sys.argv[3]), at_once)
with stop.listening(float(sys.argv[2])), journal.at(stage="local training", round=4):
    print("ready", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # for ever, as a collective waits for a rank that does not come
"""


def hear_hangup() -> None:
    """Let SIGHUP act as usual, also where the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def end(folder: Path, grace_s: float, numbers: list[int], size: int = 1, nohup: bool = False) -> tuple[int, str]:
    """Start the process, send it signals, and wait: its status and what it says."""
    words = ["nohup"] if nohup else []
    command = [*words, sys.executable, "-c", BUSY, str(folder), str(grace_s), str(size)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_hangup
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(2.5 if len(numbers) > 1 else 0)
        told = process.communicate(timeout=20)[1]
    return process.returncode, told


@pytest.mark.parametrize(
    ("grace_s", "numbers", "name"),
    [
        (0.3, [signal.SIGTERM], "SIGTERM"),
        (0.3, [signal.SIGHUP], "SIGHUP"),
        (60, [signal.SIGINT, signal.SIGINT], "SIGINT"),
    ],
    ids=["deadline", "hangup", "twice"],
)
def test_a_process_that_does_not_come_to_an_end_is_ended(
    tmp_path: Path, grace_s: float, numbers: list[int], name: str
) -> None:
    status, told = end(tmp_path, grace_s, numbers)
    assert status == 128 + numbers[0]
    assert told == (
        f"stopped: {name} came in local training, round 4: what was begun there is done again when the same command is "
        "started\n"
    )
    note = read_ending(tmp_path)
    assert note is not None and (note["reason"], note["stage"], note["round"]) == ("stopped", "local training", 4)
    last = (tmp_path / "logs" / "rank-000.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "stopped"


def test_nohup_outlasts_its_terminal(tmp_path: Path) -> None:
    status, told = end(tmp_path, 0.3, [signal.SIGHUP, signal.SIGTERM], nohup=True)
    assert status == 128 + signal.SIGTERM and "stopped: SIGTERM came" in told


@pytest.mark.parametrize(("state", "reason"), [("alive", "stopped"), ("gone", "lost rank")])
def test_of_several_ranks_only_a_dead_one_is_to_blame(tmp_path: Path, state: str, reason: str) -> None:
    """Rank 1 is busy too, and has had no time to say anything; or it was killed, and its launcher signals the rest."""
    other = Journal(1)
    other.open(tmp_path)
    if state == "gone":
        path = log_file(tmp_path, 1)
        path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {2**22 + 1}'))
    status, told = end(tmp_path, 0.2, [signal.SIGTERM], size=2)
    note = read_ending(tmp_path)
    assert status == 143 and note is not None and note["reason"] == reason
    assert told.startswith("stopped: SIGTERM came" if state == "alive" else "error: rank 1 ended without a word")


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    told: list[int] = []
    stop.on_signal = told.append
    with stop.listening(grace_s=60):
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on: the first one counts
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signal_name(stop.signal) == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert told == [signal.SIGTERM]


def test_a_signal_as_the_last_thing_ends_nothing_later() -> None:
    """The watcher may read it when the block is over."""
    ends: list[int] = []
    for _ in range(20):
        stop = StopRequest()
        stop._end = lambda at_once=False: ends.append(1)  # type: ignore[method-assign]
        with stop.listening(grace_s=0.05):
            os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    assert ends == []


def test_a_wish_that_is_obeyed_is_not_enforced() -> None:
    stop, ends = StopRequest(), list[int]()
    stop._end = lambda at_once=False: ends.append(1)  # type: ignore[method-assign]
    with stop.listening(grace_s=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
        stop.mark_done()
        time.sleep(0.5)
    assert ends == []
