"""Engine overhead: what a stack is charged to, and the arithmetic of shares."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from fedsim.base import keyed_random
from fedsim.base.ranks import Term
from fedsim.parallel.sums import Summer
from tools.bench import engine
from tools.bench.models import MICRO
from tools.bench.stage import Bench, LeftOut


def repeated(work: Callable[[], object], seconds: float = 0.15) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()


LINEAR = torch.nn.Linear(300, 300)
INPUT, VECTOR = torch.ones(300, 300), torch.ones(1000)


def backward() -> None:
    LINEAR(INPUT).sum().backward()


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda: keyed_random.derive(3, "what", 1), "engine"),
        (backward, "model"),
        (lambda: Summer(None, exact=True).sum([[Term(VECTOR)]], [1000], 1), "model"),
    ],
)
def test_time_is_charged_to_what_is_done(work: Callable[[], object], kind: str) -> None:
    sampler = engine.Sampler()
    began = time.perf_counter()
    with sampler.running():
        repeated(work)
    spent = time.perf_counter() - began
    charged = sum(seconds for place, seconds in sampler.seconds.items() if place.kind == kind)
    assert charged > 0.5 * spent, sampler.seconds
    assert sum(sampler.seconds.values()) == pytest.approx(spent, abs=0.05)


def test_shares_leave_waiting_out_and_add_over_the_ranks() -> None:
    ranks = [
        {"places": [["model", "a", 6.0], ["engine", "b", 1.0], ["waiting", "c", 50.0]]},
        {"places": [["model", "a", 2.0], ["engine", "d", 0.5], ["engine", "b", 0.5]]},
    ]
    found = engine.shares({"ranks": ranks})
    assert found == {"model_s": 8.0, "engine_s": 2.0, "waiting_s": 50.0, "share": 0.2, "strict_share": 0.2}
    assert engine.causes({"ranks": ranks}, "engine") == {"b": 1.5, "d": 0.5}


def test_the_strict_share_counts_passes_optimizer_and_sampling_alone() -> None:
    places = [["model", "fedsim/train/loop.py::run", 6.0], ["engine", "b", 1.0]]
    places += [["model", "fedsim/parallel/sums.py::sum", 2.0], ["model", "fedsim/federation/scaffold.py::x", 1.0]]
    found = engine.shares({"ranks": [{"places": places}]})
    assert found["share"] == 0.1 and found["strict_share"] == 0.4


@pytest.mark.parametrize(("device", "share", "seconds"), [("cpu", 0.05, 15.0), ("cuda", 0.03, 60.0)])
def test_rows_have_their_targets(device: str, share: float, seconds: float) -> None:
    ranks = [{"places": [["model", "a", 1 - share], ["engine", "b", share]], "marks": {"first_step_s": seconds}}]
    before = {"imports_s": 2.0, "filter_s": 9.0}
    found = {"ranks": ranks, "num_rounds": 4, "dtype": "float32", "threads": 2, "device": device, "before": before}
    assert [row.reached for row in engine.rows_of(found, 1, "warm")] == [True, True]
    assert engine.rows_of(found, 1, "warm")[1].figures == {"first_step_s": seconds, **before}
    ranks[0]["places"][1][2] *= 1.2  # type: ignore[index]
    ranks[0]["marks"]["first_step_s"] += 1  # type: ignore[index]
    rows = engine.rows_of(found, 1, "warm")
    assert [row.reached for row in rows] == [False, False] and rows[0].shapes["threads"] == 2


def test_without_datasets_the_stage_says_why_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda library: library != "datasets")
    bench = Bench(torch.device("cpu"), MICRO, threads=1, say=lambda line: None)
    with pytest.raises(LeftOut, match="datasets, which is not installed"):
        engine.STAGE.check(bench)
