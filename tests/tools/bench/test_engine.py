"""Engine overhead: what a stack is charged to, and the arithmetic of shares."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from fedsim import keys
from fedsim.parallel.sums import Summer
from fedsim.ranks import Term
from tools.bench import engine


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
        (lambda: keys.derive(3, "what", 1), "engine"),
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
    assert found == {"model_s": 8.0, "engine_s": 2.0, "waiting_s": 50.0, "share": 0.2}
    assert engine.causes({"ranks": ranks}, "engine") == {"b": 1.5, "d": 0.5}


def test_a_row_has_the_target() -> None:
    ranks = [{"places": [["model", "a", 19.0], ["engine", "b", 1.0]], "marks": {"first_step_s": 9.0}}]
    row = engine.row({"ranks": ranks, "num_rounds": 4}, 1, "warm")
    assert row.reached is True and row.figures["first_step_s"] == 9.0
    ranks[0]["places"][1][2] = 2.0  # type: ignore[index]
    assert engine.row({"ranks": ranks, "num_rounds": 4}, 1, "warm").reached is False
