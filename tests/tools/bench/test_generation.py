"""The generation stage on a model of a few thousand weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tools.bench import generation
from tools.bench.generation import STAGE, Conversations
from tools.bench.models import MICRO
from tools.bench.stage import Bench


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Short rows."""
    monkeypatch.setattr(generation, "MEAN", 7.0)
    monkeypatch.setattr(generation, "ASKED", 3)
    return Bench(torch.device("cpu"), MICRO, threads=1, repeats=1, budget_s=0.0, say=lambda line: None)


def test_both_sides_do_the_same_work(bench: Bench) -> None:
    (check,) = STAGE.check(bench)
    assert check.passed
    rows = Conversations(bench, 5, 3)
    own, plain = generation.models(bench)
    lengths = [[len(turn) for turn in row] for row in rows.ours(own, 2, 1.0)]
    assert lengths == [list(limits) for limits in zip(*rows.replies, strict=True)]
    assert [[len(turn) for turn in row] for row in rows.theirs(plain, 2, 1.0)] == lengths
    assert all(kept == prompt - 1 - generation.ASKED for kept, prompt, _ in rows.turns if kept), "what was said is kept"
    assert sum(kept > 0 for kept, _, _ in rows.turns) == 5 * 2


def test_another_token_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generation.plain_generate

    def wrong(*given: object) -> list[list[int]]:
        return [[ids[0] ^ 1, *ids[1:]] for ids in real(*given)]  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "plain_generate", wrong)
    assert not STAGE.check(bench)[0].passed


def test_rows_name_the_batch_size_that_is_best(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ROWS", {False: 6})
    monkeypatch.setattr(generation, "BATCHES", {False: (2, 6)})
    rows = STAGE.time(bench)
    assert {row.shapes["turns"] for row in rows} == {1, 3}
    for row in rows:
        assert row.peer is not None and "of 2, 6" in row.peer and row.ratio is not None
        assert row.floor_s is not None and row.seconds is not None and 0 < row.floor_s < row.seconds.p50
    assert [row.target is not None for row in rows] == ["default" in row.name for row in rows]


def test_a_part_of_the_rows_is_spread_over_their_lengths(bench: Bench) -> None:
    rows = Conversations(bench, 12, 2)
    some = rows.thinned(4)
    assert some.prompts == rows.prompts[::3] and some.replies == [turn[::3] for turn in rows.replies]
    assert [len(turn) for turn in some.theirs(generation.models(bench)[1], 4, 0.0)] == [2] * 4


@pytest.mark.parametrize(("slots", "passes"), [(1, 18), (2, 9), (8, 7)])
def test_the_floor_counts_the_passes_that_cannot_be_spared(bench: Bench, slots: int, passes: int) -> None:
    rows = Conversations(bench, 3, 2)
    rows.replies = [[3, 1, 4], [2, 6, 2]]
    assert rows.least_passes(slots) == passes


@pytest.mark.parametrize("fault", [False, True])
def test_graphs_are_compared_by_backend(bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: bool) -> None:
    """The graph of one side draws another token."""
    real = Conversations.ours

    def ours(self: Conversations, *given: Any, capture: Any = None) -> list[list[list[int]]]:
        made = real(self, *given)
        return made if capture or not fault else [[[ids[0] ^ 1] for ids in row] for row in made]

    monkeypatch.setattr(Conversations, "ours", ours)
    check = generation.replayed(bench, Conversations(bench, 3, 2), "fedsim_fused")
    assert check.part == "graphs over sdpa" and check.passed is not fault
