"""The guard's stage on a micro model: its checks pass, and fail where the two sides differ."""

from __future__ import annotations

import pytest
import torch

from fedsim.run.peak import Peak
from tools.bench import guard
from tools.bench.guard import SHARED, STAGE, Guard, verdict_lengths
from tools.bench.models import MICRO
from tools.bench.stage import Bench

BENCH = Bench(torch.device("cpu"), MICRO, threads=1, repeats=1, budget_s=0.0, say=lambda _: None)


def test_ours_equals_whole_prompts_and_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in STAGE.check(BENCH))
    candidate_logits, read_head = guard.candidate_logits, guard.read_head
    monkeypatch.setattr(guard, "candidate_logits", lambda *arguments: candidate_logits(*arguments).flip(1))
    assert [check.passed for check in STAGE.check(BENCH)] == [True, False], "the words are exchanged"
    monkeypatch.setattr(guard, "candidate_logits", candidate_logits)
    monkeypatch.setattr(guard, "read_head", lambda model, ids: read_head(model, ids[::-1].copy()))
    assert not STAGE.check(BENCH)[0].passed, "another head is read"


def test_prompts_begin_alike_and_replies_are_as_long_as_a_verdict() -> None:
    made = Guard(BENCH, 5)
    heads = {tuple(prompt[:SHARED].tolist()) for prompt in made.prompts}
    assert len(heads) == 1 and len({len(prompt) for prompt in made.prompts}) > 1
    assert [len(ids) for ids in made.generated(2)] == [3, 6, 3, 7, 3] == verdict_lengths(5)
    assert [len(ids) for ids in made.generated(2, verdicts=False)] == [1] * 5
    assert made.scores().shape == (5, 2) and len(made.thinned(2).scores()) == 3


def test_the_floor_reads_the_weights_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that computes in no time."""
    monkeypatch.setattr(Bench, "peak", lambda self: Peak(1e30, 1e9, "a test"))
    made = Guard(BENCH, 5)
    assert made.floor(1) > made.floor(10**6) > 0


def test_all_peers_have_a_row_and_generation_of_verdicts_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ROWS", {False: 6})
    monkeypatch.setattr(guard, "BATCHES", {False: (2, 3)})
    rows = STAGE.time(BENCH)
    assert [row.target is not None for row in rows] == [True, False, False]
    assert all(row.ratio is not None and row.repeats == 1 for row in rows)
