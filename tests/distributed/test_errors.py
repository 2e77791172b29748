"""A user's mistake on several processes: one line, from rank 0, every process ends non-zero, and nobody waits."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.data.chat import ChatFormat
from fedsim.world import square_rows
from tests.distributed.entry import run_entry

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
Ended = tuple[int, str, float]


def launch(words: list[str]) -> Ended:
    """The entry point as this rank runs it: exit code, what went to standard error, and seconds."""
    began = time.monotonic()
    return *run_entry(words), time.monotonic() - began


def malformed_row(folder: Path) -> list[str]:
    rows: list[dict[str, Any]] = square_rows()[:100]
    rows[6]["response_en"] = 5
    (folder / "square.json").write_text(json.dumps(rows), encoding="utf-8")
    return [f"data.square={folder / 'square.json'}"]


def malformed_csv(folder: Path) -> list[str]:
    with (folder / "attacks.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["goal", "target"], ["Ask the baker for bread", "Sure"], ["Wave", ""]])
    return [f"eval.advbench={folder / 'attacks.csv'}"]


def torn_weights(folder: Path) -> list[str]:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return [f"model.path={folder / 'model'}", "guard.kind=none"]


def without(name: str) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        (folder / "model" / name).unlink()
        return [f"guard.path={folder / 'model'}"]

    return spoil


# What is wrong → how it is made, and what the one line must say.
MISTAKES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "a missing file": (lambda folder: [f"eval.hhh={folder / 'hhh.jsonl'}"], ("hhh.jsonl", "cannot be read")),
    "a malformed row": (malformed_row, ("square.json, row 7", "'response_en'", "must be text")),
    "an empty field": (malformed_csv, ("attacks.csv, line 3", "'target'", "empty")),
    "no weights": (without("model.safetensors"), ("guard.path", "weights")),
    "no tokenizer": (without("tokenizer.json"), ("guard.path", "tokenizer")),
    "no chat template": (without("chat_template.jinja"), ("chat template",)),
    "torn weights": (torn_weights, ("model.path", "safetensors")),
    "too many processes": (
        lambda folder: ["federation.clients_per_round=1", "parallel.wide_lanes=false"],
        ("2 processes", "must be <= 1", "start fewer"),
    ),
    "more clients than rows": (lambda folder: ["federation.num_clients=61"], ("federation.num_clients=61", "60 rows")),
    "another configuration": (
        lambda folder: ["local.lr=0.5"],
        ("another configuration", "local.lr was 0.01, is 0.5", "name=..."),
    ),
}


@pytest.fixture(scope="module")
def first_round(pool: Any, square_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one brief round."""
    folder = tmp_path_factory.mktemp("first")
    ended = pool.run(1, launch, [*places(folder, square_file), "federation.num_rounds=1", "eval.limit=1"])
    assert ended[0][0] == 0, ended[0][1]
    return folder


def places(folder: Path, square_file: Path) -> list[str]:
    return [
        str(SMALL), f"data.square={square_file}", f"record.dir={folder / 'runs'}",
        f"record.artefacts={folder / 'artefacts'}",
    ]  # fmt: skip


@pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_once_by_rank_0_and_ends_every_process(
    pool: Any, square_file: Path, first_round: Path, tmp_path: Path, name: str, check: bool,
    make_llama: Callable[..., LlamaForCausalLM], llama3_bytes_chat: ChatFormat,
) -> None:  # fmt: skip
    make_llama(max_position_embeddings=2048).save_pretrained(str(tmp_path / "model"))
    llama3_bytes_chat.tokenizer.save_pretrained(str(tmp_path / "model"))
    shutil.copytree(first_round / "runs", tmp_path / "runs") if name == "another configuration" else None
    make, parts = MISTAKES[name]
    words = [*places(tmp_path, square_file), "federation.num_rounds=1", "eval.limit=1", *make(tmp_path)]
    ended: list[Ended] = pool.run(2, launch, ["--check", *words] if check else words)
    assert [code for code, _, _ in ended] == [2, 2]
    (line,) = [line for line in ended[0][1].splitlines() if line.startswith("error:")]
    assert all(part in line for part in parts), line
    assert ended[1][1] == "" and "Traceback" not in ended[0][1]
    assert max(seconds for _, _, seconds in ended) < 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ranks_without_a_gpu_end_with_one_line(pool: Any, tmp_path: Path) -> None:
    """Before the processes form a group: the first rank says what is wrong, and nobody waits for the others."""
    words = [str(SMALL), "parallel.device=cuda", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    ended: list[Ended] = pool.run(3, launch, words)
    assert [code for code, _, _ in ended] == [2, 2, 2] and max(seconds for _, _, seconds in ended) < 20
    (line,) = [line for _, text, _ in ended for line in text.splitlines() if line.startswith("error:")]
    assert line.startswith("error: parallel.device=cuda: ") and "parallel.device=cpu" in line
    assert ended[0][1].splitlines() == [line]
