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

from fedsim.parallel.stopping import StopRequest, signal_name
from fedsim.record.ending import read_ending

# A process that is busy in one place and never comes to the end of a round; arguments: a folder and the grace.
BUSY = """
import sys, time
from pathlib import Path
from fedsim.parallel.failing import stop_here
from fedsim.parallel.stopping import StopRequest
from fedsim.record.journal import Journal
stop, journal = StopRequest(), Journal()
journal.open(Path(sys.argv[1]))
stop.on_deadline = lambda number: stop_here(journal, number, 1, 9.0)
with stop.listening(float(sys.argv[2])), journal.at(stage="local training", round=4):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("grace_s", "numbers", "name"),
    [("0.3", [signal.SIGTERM], "SIGTERM"), ("60", [signal.SIGINT, signal.SIGINT], "SIGINT")],
    ids=["deadline", "twice"],
)
def test_a_process_that_does_not_come_to_an_end_is_ended(
    tmp_path: Path, grace_s: str, numbers: list[int], name: str
) -> None:
    command = [sys.executable, "-c", BUSY, str(tmp_path), grace_s]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(1.2 if len(numbers) > 1 else 0)
        told = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + numbers[0]
    assert told == (
        f"stopped: {name} came in local training, round 4: what was begun there is done again when the same command is "
        "started\n"
    )
    note = read_ending(tmp_path)
    assert note is not None and (note["reason"], note["stage"], note["round"]) == ("stopped", "local training", 4)
    last = (tmp_path / "logs" / "rank-000.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "stopped"


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    with stop.listening(grace_s=60):
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on: the first one counts
        assert signal_name(stop.signal) == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
