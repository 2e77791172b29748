"""Rows, lanes of one process, and lanes whose members are threads that take turns."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pytest
import torch

from fedsim.base.ranks import Term
from fedsim.data.chat import TokenRow
from fedsim.parallel.sums import Summer

Result = TypeVar("Result")


@dataclass
class OneLane:
    """A lane of this process alone."""

    exact: bool = True
    index: int = 0
    size: int = 1
    summer: Summer = field(init=False)

    def __post_init__(self) -> None:
        self.summer = Summer(None, exact=self.exact)


class SharedSummer(Summer):
    """Adds the terms of several threads, in an order drawn anew for every sum.

    A thread holds ``turn`` while it computes, so that torch's global generator is never shared in mid-pass.
    """

    def __init__(self, size: int, *, exact: bool, seed: int) -> None:
        super().__init__(None, exact=exact)
        self.turn = threading.Lock()
        self._terms: list[list[list[Term]]] = []
        self._barrier = threading.Barrier(size, timeout=60)
        self._random = random.Random(seed)
        self._sums: list[torch.Tensor] = []

    def sum(self, segments: Sequence[Sequence[Term]], sizes: Sequence[int], count: int) -> list[torch.Tensor]:
        self._terms.append([list(terms) for terms in segments])
        self.turn.release()
        if self._barrier.wait() == 0:
            merged = [[t for member in self._terms for t in member[i]] for i in range(len(sizes))]
            for terms in merged:
                self._random.shuffle(terms)
            self._sums = super().sum(merged, sizes, count)
            self._terms = []
        self._barrier.wait()
        self.turn.acquire()
        return [s.clone() for s in self._sums]


@dataclass(frozen=True)
class ThreadLane:
    """One member's view of a lane of threads."""

    index: int
    size: int
    summer: SharedSummer


def run_members(size: int, work: Callable[[ThreadLane], Result], *, exact: bool = True, seed: int = 0) -> list[Result]:
    """``work`` on every member of a lane of ``size`` threads; results by member."""
    summer = SharedSummer(size, exact=exact, seed=seed)
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def member(index: int) -> None:
        with summer.turn:
            try:
                results[index] = work(ThreadLane(index, size, summer))
            except BaseException as error:
                failures.append(error)
                summer._barrier.abort()
                raise

    threads = [threading.Thread(target=member, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[i] for i in range(size)]


def random_rows(num: int, seed: int = 0, longest: int = 40) -> list[TokenRow]:
    """Rows of mixed length whose last part is the target."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        length = int(rng.integers(6, longest))
        mask = np.arange(length) >= int(rng.integers(1, length))
        rows.append(TokenRow(rng.integers(0, 250, length).astype(np.int32), mask))
    return rows


@pytest.fixture(scope="session")
def one_lane() -> type[OneLane]:
    """``one_lane(exact=True)``: a lane of this process alone."""
    return OneLane


@pytest.fixture(scope="session")
def on_members() -> Callable[..., list]:  # type: ignore[type-arg]
    """``on_members(size, work, exact=True, seed=0)``: run ``work(lane)`` on every member of a lane."""
    return run_members


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[TokenRow]]:
    """``make_rows(num, seed=0, longest=40)``."""
    return random_rows
