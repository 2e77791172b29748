"""All ranks take the best paths that all can: one rank's failure changes every rank, over real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig

from fedsim.attention import choice
from fedsim.attention.choice import choose
from fedsim.base.errors import ModelError
from fedsim.config import load_config
from fedsim.data.chat import user_turn
from fedsim.generate import engine as engine_module
from fedsim.generate.engine import Engine, Sampling
from fedsim.model.load import load_base
from fedsim.parallel.world import process_world
from fedsim.report import finish
from fedsim.run.simulation import Simulation
from tools.chaos.outcome import different, outcome

WRONG = "its self-test failed: dk is 0.3 off"
SMALL = Path(__file__).parent / "small.yaml"
BRIEF = [
    "federation.num_rounds=1",
    "guard.kind=none",
    "cai.iterations=0",
    "eval.guard_judge=none",
    "eval.mt_bench=",
    "eval.batch_size=2",
]
CHATS = [[user_turn(f"May I fly kite {i}?")] for i in range(6)]


def chosen(wanted: str, failing: dict[int, str]) -> tuple[str, str]:
    """What a rank takes on a GPU that only the choice sees, where self-tests of a backend fail on some ranks."""
    with process_world(exact=True, threads=1, timeout_s=60) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_capability", lambda device: (8, 0))
        patch.setattr(choice, "fault", lambda name, *_: WRONG if name == failing.get(world.rank) else None)
        try:
            found = choose(wanted, LlamaConfig(), torch.bfloat16, torch.device("cuda"), world.ranks)
        except ModelError as error:
            return "refused", str(error)
        return found.name, found.why


def test_one_rank_s_failure_changes_every_rank(pool: Any) -> None:
    none, one, two, asked = pool.run_all(
        [
            (2, chosen, "auto", {}),
            (3, chosen, "auto", {1: "varlen"}),
            (4, chosen, "auto", {0: "sdpa", 3: "varlen"}),
            (2, chosen, "varlen", {1: "varlen"}),
        ]
    )
    assert [name for name, _ in none] == ["varlen"] * 2
    assert one == [one[0]] * 3 and one[0][0] == "sdpa" and f"not varlen: on rank 1, {WRONG}" in one[0][1]
    assert {name for name, _ in two} == {"eager"} and f"not sdpa: on rank 0, {WRONG}" in two[0][1]
    assert asked == [("refused", f"model.attention='varlen': {WRONG}; set model.attention=auto")] * 2


class Replayed:
    """In a graph's place."""

    def __init__(self, step: Any) -> None:
        self.replay = step


def replies(failing: int | None) -> tuple[list[str], str | None, list[str], int]:
    """Two calls of an engine whose graphs cannot be captured on one rank: replies, the problem, notes, captures."""
    with process_world(exact=True, threads=1, timeout_s=60) as world, pytest.MonkeyPatch.context() as patch:
        base, chat = load_base(
            "embedded", dtype="float32", attention="auto", device=world.device, key="model.path", ranks=world.ranks
        )
        num_captures = 0

        def capture(step: Any) -> Replayed:
            nonlocal num_captures
            num_captures += 1
            if world.rank == failing:
                raise RuntimeError("no graphs here")
            return Replayed(step)

        patch.setattr(engine_module, "uses_graphs", lambda device: True)
        patch.setattr(engine_module, "capture_cuda", capture)
        engine = Engine(base, chat, world.ranks, batch_size=2, max_context=256, seed=3)
        notes: list[str] = []
        engine.on_note = notes.append
        texts = [reply.text for reply in engine.generate(CHATS, Sampling(1.0, 12), ("a",))]
        num_captures = 0
        texts += [reply.text for reply in engine.generate(CHATS, Sampling(1.0, 12), ("b",))]
        return texts, engine.graph_problem, notes, num_captures


def test_graphs_that_fail_on_one_rank_are_off_on_all_and_change_no_token(pool: Any) -> None:
    alone, together, failing = pool.run_all([(1, replies, None), (3, replies, None), (3, replies, 1)])
    texts = cast(list[str], alone[0][0])
    assert len(set(texts)) > 3
    assert all(found[:3] == (texts, None, []) for found in together) and alone[0][3] > 0
    assert any(found[3] > 0 for found in together)
    why = "capturing a step ended with RuntimeError: no graphs here"
    problem = f"CUDA graphs of decoding steps are off: {why} on rank 1"
    assert failing == [(texts, problem, [problem], 0)] * 3, "said once; the second call captures nothing"


def whole_run(overrides: list[str], attention_fails_on: int | None, graphs_fail_on: int | None) -> int:
    """A run with stand-ins for graphs; what fails on a rank is the self-test of SDPA, or the capture of a graph."""
    config = load_config(SMALL, overrides)
    num_captures = 0
    with process_world(exact=True, threads=1, timeout_s=60) as world, pytest.MonkeyPatch.context() as patch:

        def tested(name: str, *_: Any) -> str | None:
            return WRONG if name == "sdpa" and world.rank == attention_fails_on else None

        def capture(step: Any) -> Replayed:
            nonlocal num_captures
            num_captures += 1
            if world.rank == graphs_fail_on:
                raise RuntimeError("no graphs here")
            return Replayed(step)

        patch.setattr(choice, "_self_test", tested)
        patch.setattr(engine_module, "uses_graphs", lambda device: True)
        patch.setattr(engine_module, "capture_cuda", capture)
        patch.setattr(finish, "write_plots", lambda *_: [])
        Simulation(config, world).run()
    return num_captures


@pytest.mark.deep
def test_a_run_falls_back_says_so_and_keeps_its_bits(pool: Any, square_file: Path, tmp_path: Path) -> None:
    """Graphs that fail on one rank change no bit; attention that fails on one rank gives what all can take."""

    def places(name: str) -> list[str]:
        own = [f"record.dir={tmp_path / name}", f"record.artefacts={tmp_path / name / 'artefacts'}"]
        return [*BRIEF, f"data.square={square_file}", *own]

    def manifest(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / name / "small" / "manifest.json").read_text(encoding="utf-8"))
        return found

    def said(name: str) -> list[str]:
        log = (tmp_path / name / "small" / "logs" / "rank-000.jsonl").read_text(encoding="utf-8")
        return [entry["text"] for entry in map(json.loads, log.splitlines()) if entry["event"] == "note"]

    pool.run_all(
        [
            (1, whole_run, [*places("right"), "model.attention=eager"], None, None),
            (2, whole_run, [*places("wrong"), "model.attention=auto"], 1, 1),
        ]
    )
    right, wrong = (outcome(tmp_path / name / "small", tmp_path / name / "artefacts") for name in ("right", "wrong"))
    assert different(wrong, right) in ([], ["artefacts"]), "keys of artefacts name the setting"
    why = f"eager (auto; not sdpa: on rank 1, {WRONG})"
    assert manifest("wrong")["attention"] == {"model": why}
    assert [line for line in said("wrong") if "attention" in line] == [f"attention of the model: {why}"]
    problem = (
        "CUDA graphs of decoding steps are off: capturing a step ended with RuntimeError: no graphs here on rank 1"
    )
    assert manifest("wrong")["notes"] == [problem] == [line for line in said("wrong") if "graphs" in line]
    assert manifest("right")["attention"] == {"model": "eager (asked for)"} and "notes" not in manifest("right")
