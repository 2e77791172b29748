"""Launchers other than torchrun: the same run under ``deepspeed``; one error and no hang, whoever starts processes.

torchrun and plain python are in tests/test_cli.py. Without torchrun the store of the processes is in rank 0, and dies
with it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fedsim.base.artefacts import file_digest
from fedsim.base.errors import RunError
from fedsim.config import load_config
from fedsim.parallel.world import process_world
from fedsim.record.metrics import decided_rows, read_rows
from fedsim.report import finish
from fedsim.run.simulation import Simulation

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
ZERO = ["guard.kind=llama_guard", "eval.guard_judge=none", "guard.deepspeed=zero2", "parallel.exact=false"]
SHORT = ["federation.num_rounds=1", "guard.kind=noisy_oracle", "cai.iterations=0", "eval.limit=2", "eval.mt_bench="]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
    return port


def environment(**added: str) -> dict[str, str]:
    """As a user's shell has it: nothing of any launcher's."""
    outer = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_|LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not outer.match(name)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"} | added


def run(words: list[str], **added: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**added), capture_output=True, text=True, timeout=120, check=False
    )


def deepspeed(words: list[str]) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_gpus 2 launch/run.py …``, by its module."""
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port", str(free_port())]
    return run([*launcher, "launch/run.py", *words])


def reference(overrides: list[str]) -> None:
    """The run as torchrun starts it."""
    config = load_config(SMALL, overrides)
    finish.write_plots = lambda *_: []
    with process_world(exact=False, threads=1, timeout_s=60, device="cpu") as world:
        Simulation(config, world).run()


def outcome(folder: Path) -> tuple[list[Any], str]:
    """Decided metrics and the final adapter of a run."""
    adapter = folder / "small" / "adapter" / "adapter_model.safetensors"
    return decided_rows(read_rows(folder / "small" / "metrics.jsonl")), file_digest(adapter)


@pytest.mark.deep
def test_a_run_under_deepspeeds_launcher_is_the_same_run(pool: Any, square_file: Path, tmp_path: Path) -> None:
    """Its guard is fine-tuned under ZeRO-2; one round, before anything measured decides a placement."""

    def words(folder: Path) -> list[str]:
        return [
            *SHORT,
            *ZERO,
            f"data.square={square_file}",
            f"record.dir={folder}",
            f"record.artefacts={folder}/artefacts",
        ]

    ended = deepspeed([str(SMALL), *words(tmp_path / "deepspeed")])
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "2 processes" in ended.stdout and ended.stdout.count("Written:") == 1
    assert len(list((tmp_path / "deepspeed" / "artefacts").glob("guard-adapter-*"))) == 1
    pool.run(2, reference, words(tmp_path / "torchrun"))
    assert outcome(tmp_path / "deepspeed") == outcome(tmp_path / "torchrun")


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.deep
def test_under_deepspeeds_launcher_an_error_is_said_once() -> None:
    ended = deepspeed([str(SMALL), "nope=3"])
    assert ended.returncode == 2
    assert len(errors(ended.stderr)) == 1 and "Traceback" not in ended.stderr


# Two processes that nobody watches over, as a user's own script may start them; arguments: a port, who fails, files for
# what they say. They are forked, so that the imports are paid for once.
FAIL = """
import os, sys, time
import torch, torch.distributed as dist
from fedsim.base.errors import RunError
from fedsim.parallel.world import process_world

def work(bad):
    try:
        with process_world(exact=False, threads=1, timeout_s=60, device="cpu") as world:
            if bad in (str(world.rank), "both"):
                raise RunError("the loss became NaN")
            time.sleep(1.0)  # busy while the other leaves
            dist.all_reduce(torch.zeros(3))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

port, bad, *logs = sys.argv[1:]
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
for rank, log in enumerate(logs):
    if os.fork() == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        work(bad)
        sys.exit(0)
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in logs))
"""


@pytest.mark.parametrize("bad", ["0", "1", "both"])
def test_one_rank_speaks_and_nobody_hangs_where_rank_0_holds_the_store(bad: str, tmp_path: Path) -> None:
    logs = [tmp_path / "0", tmp_path / "1"]
    ended = run(["-c", FAIL, str(free_port()), bad, *map(str, logs)])
    assert ended.stdout == "[2, 2]\n", ended.stderr
    said = [log.read_text() for log in logs]
    assert sorted(map(errors, said)) == [[], ["error: the loss became NaN"]]
    assert bad == "both" or errors(said[int(bad)])
    assert "Traceback" not in "".join(said)


def test_processes_that_cannot_meet_are_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"cannot meet \(WORLD_SIZE=2\).*RANK.*torchrun"), _joined():
        pass
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=rf"MASTER_PORT={port}.*--master_port of its own"), _joined():
            pass
    assert not dist.is_initialized()


def _joined() -> Any:
    return process_world(exact=False, threads=torch.get_num_threads(), timeout_s=5)
