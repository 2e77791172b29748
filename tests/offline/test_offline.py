"""Shortened demo runs without a network: they succeed, no process tries to leave the machine, and no secret is written.

Two nets catch what tries. An audit hook in every Python process (``sitecustomize.py``) refuses connections and look-ups
beyond this machine and writes them down. Where namespaces can be had, the run has a network of its own as well
(``alone.py``), and the kernel counts what had no way out, whatever sent it: wandb's Go process, gloo, the C library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHORT = [
    "configs/demo.yaml",
    "federation.num_rounds=1",
    "federation.num_clients=5",
    "local.steps=1",
    "cai.iterations=1",
    "eval.limit=1",
    "eval.max_new_tokens=8",
    "guard.tune_epochs=0.05",
    "guard.measure_untuned=false",
    "data.federated_rows=40",
    "data.guard_rows=16",
    "data.cai_rows=12",
]
JUDGE = ["judge.kind=openai", "judge.base_url=http://127.0.0.1:9/v1", "judge.retries=0"]
PROMPTS = {
    "single-v1": "{question} {answer}",
    "single-math-v1": "{question} {ref_answer_1} {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_1} {answer_2}",
}

CANARIES = {
    "OPENAI_API_KEY": "sk-canary-openai-1f0e",
    "WANDB_API_KEY": "c" * 27 + "anary4wandb3",  # 40 characters, as theirs are
    "HF_TOKEN": "hf_canaryhuggingface77",
    "ANTHROPIC_API_KEY": "canary-judge-5d5d",
    "HTTPS_PROXY": "http://me:canary-proxy-word@127.0.0.1:9",
}
WORDS = [*list(CANARIES.values())[:-1], "canary-proxy-word"]


def has_namespaces() -> bool:
    """Whether a process may have a network and mounts of its own."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    return subprocess.run(["unshare", "-rnm", "true"], capture_output=True, check=False).returncode == 0


ALONE = has_namespaces()


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        folder: everything that it wrote, and its home.
        code: exit status.
        shown: what it printed.
        attempts: what the audit hook refused.
        counts: what had no way out of the run's own network; empty where it had none.
    """

    folder: Path
    code: int
    shown: bytes
    attempts: str
    counts: Mapping[str, int]


def watched(folder: Path, command: list[str]) -> Ended:
    """Run a command in both nets, with canaries in its environment."""
    (folder / "home").mkdir(parents=True)
    attempts, counts = folder.parent / f"{folder.name}-attempts", folder.parent / f"{folder.name}-counts.json"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        **CANARIES,
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its fonts are known there
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "FEDSIM_TEST_ATTEMPTS": str(attempts),
        "OMP_NUM_THREADS": "1",
    }
    around = ["unshare", "-rnm", sys.executable, str(HERE / "alone.py"), str(counts)] if ALONE else []
    done = subprocess.run(
        [*around, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=150,
        check=False,
    )
    told = attempts.read_text(encoding="utf-8") if attempts.exists() else ""
    return Ended(folder, done.returncode, done.stdout, told, json.loads(counts.read_text()) if ALONE else {})


def simulate(folder: Path, num_processes: int, words: list[str]) -> Ended:
    """A shortened demo run."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"] if num_processes > 1 else []
    places = [f"record.dir={folder / 'runs'}", f"record.artefacts={folder / 'artefacts'}"]
    return watched(folder, [sys.executable, *torchrun, "launch/run.py", *SHORT, *words, *places])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future[Ended]]]:
    """By number of processes: one with W&B's offline mode and a judge that nobody answers for, two without either."""
    folder = tmp_path_factory.mktemp("offline")
    prompts = [
        {"name": name, "type": "single", "system_prompt": "", "prompt_template": text, "output_format": "[[rating]]"}
        for name, text in PROMPTS.items()
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    judge = [*JUDGE, f"judge.prompts={folder / 'prompts.jsonl'}"]
    with ThreadPoolExecutor(2) as threads:
        yield {
            1: threads.submit(simulate, folder / "one", 1, judge),
            2: threads.submit(simulate, folder / "two", 2, ["wandb.mode=off", "eval.mt_bench="]),
        }


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_demo_needs_no_network_and_asks_for_none(runs: dict[int, Future[Ended]], num_processes: int) -> None:
    ended = runs[num_processes].result()
    assert ended.code == 0, ended.shown.decode()[-3000:]
    assert ended.attempts == ""
    assert all(count == 0 for count in ended.counts.values()), ended.counts
    assert (ended.folder / "runs" / "demo" / "summary.md").is_file()
    assert list((ended.folder / "runs" / "demo" / "wandb").glob("offline-run-*/*.wandb")) or num_processes == 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_no_secret_of_the_environment_is_written_or_shown(runs: dict[int, Future[Ended]], num_processes: int) -> None:
    ended = runs[num_processes].result()
    files = [path for path in ended.folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and ended.code == 0
    for word in WORDS:
        assert word.encode() not in ended.shown
        assert [path for path in files if word.encode() in path.read_bytes()] == []


def test_the_judge_was_asked_with_the_key_and_named_without(runs: dict[int, Future[Ended]]) -> None:
    """So that the test above has seen a run whose judge failed."""
    shown = runs[1].result().shown.decode()
    assert "turns stay unjudged: judge 'gpt-4' at http://127.0.0.1:9/v1" in shown


def test_both_nets_catch_what_leaves(tmp_path: Path) -> None:
    """A look-up and a connection by Python; the same through the C library and the kernel, past the hook."""
    python = (
        "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept PermissionError as error: print(error)\n"
    )
    python += "try: socket.create_connection(('192.0.2.1', 80))\nexcept PermissionError as error: print(error)\n"
    caught = watched(tmp_path / "python", [sys.executable, "-c", python])
    assert [line.split()[:2] for line in caught.attempts.splitlines()] == [
        ["socket.getaddrinfo", "example.org"],
        ["socket.getaddrinfo", "192.0.2.1"],
    ]
    assert caught.shown.decode().count("beyond this machine") == 2
    if ALONE:
        past = "import ctypes; ctypes.CDLL(None).gethostbyname(b'example.org')"
        unseen = watched(tmp_path / "c", [sys.executable, "-c", past])
        assert unseen.attempts == "" and sum(unseen.counts.values()) > 0
