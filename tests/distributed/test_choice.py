"""All ranks take the best paths that all can: one rank's failure changes every rank, over real processes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig

from fedsim.attention import choice
from fedsim.attention.choice import choose
from fedsim.data.chat import user_turn
from fedsim.errors import ModelError
from fedsim.generate import engine as engine_module
from fedsim.generate.engine import Engine, Sampling
from fedsim.model.load import load_base
from fedsim.parallel.world import process_world

WRONG = "its self-test failed: dk is 0.3 off"
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
    problem = (
        "CUDA graphs of decoding steps are off: capturing a step ended with RuntimeError: no graphs here on rank 1"
    )
    assert failing == [(texts, problem, [problem], 0)] * 3, "said once; the second call captures nothing"
