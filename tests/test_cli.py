"""The command line as a user meets it: real processes, their exit codes, and every line that they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedsim.base.artefacts import file_digest
from fedsim.base.version import made_by, maker
from fedsim.config import describe
from fedsim.config.lora import LoraSettings
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import EMBEDDED, load_model
from fedsim.record.metrics import decided_rows, read_rows
from fedsim.world import square_rows

ROOT = Path(__file__).parents[1]
SMALL = "tests/distributed/small.yaml"


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that begin with ``error:``."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def launch(words: list[str], num_processes: int = 0, entry: Sequence[str] = ("launch/run.py",)) -> Ended:
    """Run an entry point plainly, or under torchrun with ``num_processes``."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"] if num_processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, *entry, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small SQuARe file, and a directory for runs."""
    folder = tmp_path_factory.mktemp("cli")
    rows = square_rows()
    red = [row for row in rows if row["acceptable?"] == 0][:60]
    acceptable = [row for row in rows if row["acceptable?"] == 1][:90]
    (folder / "square.json").write_text(json.dumps(red + acceptable), encoding="utf-8")
    return [
        f"data.square={folder / 'square.json'}",
        f"record.dir={folder / 'runs'}",
        f"record.artefacts={folder / 'artefacts'}",
        "federation.num_rounds=2",
        "eval.every=0",
        "eval.limit=2",
    ]


@pytest.fixture(scope="module")
def run_folder(places: list[str]) -> Path:
    """Where the whole run is written."""
    return Path(places[1].partition("=")[2]) / "small"


@pytest.fixture(scope="module")
def finished(places: list[str]) -> Ended:
    """A whole run on two processes."""
    return launch([SMALL, *places], num_processes=2)


MISTAKES = {
    "help": (["--help"], 0),
    "unknown": (["federation.num_round=3"], 0),
    "range": ([SMALL, "local.lr=-1"], 0),
    "two files": ([SMALL, "other.yaml"], 0),
    "no config": (["absent.yaml"], 0),
    "unknown, 2 processes": (["federation.num_round=3"], 2),
    "infeasible": ([SMALL, "data.federated_rows=900"], 0),
    "no file, 2 processes": ([SMALL, "data.square=absent/square.json"], 2),
}


@pytest.fixture(scope="module")
def mistakes(places: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Ended]]:
    """Every mistaken command, two at a time; each has its own run directory."""
    with ThreadPoolExecutor(2) as threads:
        return {
            name: threads.submit(
                launch,
                [*words[:1], *places[:1], *words[1:], f"record.dir={tmp_path_factory.mktemp('runs')}"]
                if words[0] == SMALL
                else words,
                num_processes,
            )
            for name, (words, num_processes) in MISTAKES.items()
        }


def test_help_lists_every_key(mistakes: dict[str, Future[Ended]]) -> None:
    shown = mistakes["help"].result()
    assert shown.code == 0 and shown.err == ""
    lines = shown.out.splitlines()
    for info in describe():
        assert any(line.strip().startswith(f"{info.name} =") for line in lines), info.name
        assert info.meaning in shown.out


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unknown", ["federation.num_round", "federation.num_rounds", "--help"]),
        ("range", ["local.lr=-1", "> 0"]),
        ("no config", ["absent.yaml", "cannot be read"]),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(
    mistakes: dict[str, Future[Ended]], name: str, parts: list[str]
) -> None:
    ended = mistakes[name].result()
    assert ended.code == 2
    assert ended.err.splitlines() == ended.errors and len(ended.errors) == 1
    assert all(part in ended.errors[0] for part in parts)
    assert ended.out == ""


def test_two_config_files_are_one_too_many(mistakes: dict[str, Future[Ended]]) -> None:
    ended = mistakes["two files"].result()
    assert ended.code == 2 and "one config file at most" in ended.err


def test_splits_that_the_file_cannot_supply(mistakes: dict[str, Future[Ended]]) -> None:
    ended = mistakes["infeasible"].result()
    assert ended.code == 2 and "Traceback" not in ended.err
    (line,) = ended.errors
    # 900 · 0.3 + 16 · 0.5 + 12 · 0.5 = 284 red of 60; 630 + 14 = 644 acceptable of 90.
    assert "224 red rows short (284 asked, 60 in the file)" in line
    assert "554 acceptable rows short (644 asked, 90 in the file)" in line
    assert "data.federated_rows=" in line and "data.fit=true" in line


@pytest.mark.parametrize(
    ("name", "part"),
    [("unknown, 2 processes", "federation.num_rounds"), ("no file, 2 processes", "absent/square.json")],
)
def test_under_torchrun_an_error_is_said_once_and_is_the_last_thing(
    mistakes: dict[str, Future[Ended]], name: str, part: str
) -> None:
    ended = mistakes[name].result()
    assert ended.code != 0
    (line,) = ended.errors
    assert part in line
    assert ended.err.count("Traceback (most recent call last)") == 1  # torchrun's own
    *_, cause, rule = ended.err.strip().splitlines()
    assert set(rule) == {"="}
    assert cause.strip() == f"traceback : {line.removeprefix('error: ')}"


def test_a_whole_run_prints_its_table(finished: Ended, run_folder: Path) -> None:
    assert finished.code == 0, finished.err[-2000:]
    assert "FedAvg, FL + filter + CAI · 2 rounds" in finished.out
    assert "2 processes" in finished.out
    for head in ("AdvBench", "HHH", "MT-Bench", "pretrained", "in the paper", "Written:", str(run_folder)):
        assert head in finished.out
    assert finished.out.count("Written:") == 1  # one rank prints
    for line in ("round 1/2 · local training", "round 2/2 · constitutional AI", "bit-identical"):
        assert finished.err.count(line) == 1


def test_a_whole_run_writes_every_file(finished: Ended, run_folder: Path) -> None:
    assert finished.code == 0
    names = {str(p.relative_to(run_folder)) for p in run_folder.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "summary.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        *(f"{folder}/fedsim.json" for folder in ("adapter", "answers", "guard", "items")),
        "checkpoints/round-000002/state.safetensors",
        "checkpoints/round-000002/checkpoint.json",
    } <= names
    pictures = [name for name in names if name.endswith(".png")]
    assert len(pictures) >= 3
    assert all((run_folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    summary = (run_folder / "summary.md").read_text(encoding="utf-8")
    assert all(name in summary for name in pictures)
    assert f"Written by {maker(made_by())};" in summary
    stages = [(row["round"], row["stage"]) for row in read_rows(run_folder / "metrics.jsonl")]
    assert {(0, "filter"), (0, "eval"), (0, "cai_data"), (1, "round"), (2, "round"), (2, "eval")} <= set(stages)
    manifest = json.loads((run_folder / "manifest.json").read_text(encoding="utf-8"))
    assert file_digest(Path(run_folder.parents[1] / "square.json")) in json.dumps(manifest)


@pytest.mark.deep
def test_the_command_under_torchrun_is_the_same_run(
    finished: Ended, run_folder: Path, places: list[str], tmp_path: Path
) -> None:
    """``torchrun -m fedsim run`` and ``torchrun launch/run.py``: the same adapter and decided metrics, bit for bit."""
    assert finished.code == 0
    own = [f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    ended = launch([SMALL, *places, *own], num_processes=2, entry=("-m", "fedsim", "run"))
    assert ended.code == 0, ended.err[-2000:]
    assert "Written:" in ended.out and "2 processes" in ended.out
    adapters, rows = set(), []
    for folder in (run_folder, tmp_path / "small"):
        adapters.add(file_digest(folder / "adapter" / "adapter_model.safetensors"))
        rows.append(decided_rows(read_rows(folder / "metrics.jsonl")))
    assert len(adapters) == 1 and rows[0] == rows[1] and len(rows[0]) > 5


def test_the_adapter_loads_with_peft(finished: Ended, run_folder: Path) -> None:
    """The same logits, bit for bit, as the checkpoint's vector in fedsim's own model."""
    assert finished.code == 0
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(str(EMBEDDED), dtype=torch.float32)
    with torch.no_grad():
        untouched = base.eval()(ids).logits.clone()
        published = PeftModel.from_pretrained(base, str(run_folder / "adapter")).eval()(ids).logits
    lora = LoraSettings(4, 8.0, 0.1, ("q_proj", "v_proj"))
    loaded = load_model("embedded", lora, dtype="float32", attention="sdpa", device=torch.device("cpu"))
    flat = FlatAdapter(loaded.model)
    flat.load(load_file(str(run_folder / "checkpoints" / "round-000002" / "state.safetensors"))["adapter"])
    with torch.no_grad():
        own = loaded.model.eval()(ids).logits
    assert torch.equal(published, own)
    assert not torch.allclose(published, untouched, atol=1e-3)  # the adapter does something


def test_a_finished_run_is_left_alone(finished: Ended, run_folder: Path, places: list[str]) -> None:
    """Started again (here without torchrun): says so, trains nothing, changes no metric and no checkpoint."""
    assert finished.code == 0
    watched = [run_folder / "metrics.jsonl", *run_folder.glob("checkpoints/*/*"), *run_folder.glob("adapter/*")]
    before = {path: file_digest(path) for path in watched}
    again = launch([SMALL, *places])
    assert again.code == 0, again.err[-2000:]
    assert "this run is finished: all 2 rounds" in again.err
    assert "local training" not in again.err
    assert {path: file_digest(path) for path in watched} == before
    assert "FedAvg, FL + filter + CAI" in again.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        pytest.param(
            ["local.lr=0.5"], ["another configuration", "local.lr was 0.01, is 0.5", "name=..."], marks=pytest.mark.deep
        ),
        (["record.resume=never"], ["record.resume=never", "exists", "name=..."]),
    ],
)
def test_a_run_directory_is_not_taken_over(
    finished: Ended, run_folder: Path, places: list[str], words: list[str], parts: list[str]
) -> None:
    assert finished.code == 0
    before = file_digest(run_folder / "metrics.jsonl")
    ended = launch([SMALL, *places, *words])
    assert ended.code == 2 and "Traceback" not in ended.err
    (line,) = ended.errors
    assert all(part in line for part in [*parts, str(run_folder)])
    assert file_digest(run_folder / "metrics.jsonl") == before
