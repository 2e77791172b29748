"""Failures as data: one a client, what a round without them may do, and which outcomes may be summed."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from fedsim.base.errors import ClientError, NotFiniteError, RunError
from fedsim.base.journal import in_words
from fedsim.config import FailuresConfig
from fedsim.federation.algorithms import ClientOutcome
from fedsim.federation.failures import ClientFailure, by_client, check_round, checked

SKIP = FailuresConfig(on_client_error="skip", min_clients=2)
SOME = [ClientFailure(7, "raised", 1, "IndexError: too far", "Traceback\n  of it"), ClientFailure(9, "norm", 0, "long")]


def outcome(**changes: Any) -> ClientOutcome:
    facts: dict[str, Any] = {"client": 4, "num_rows": 2, "weight": 2.0, "delta": torch.tensor([3.0, 4.0]),
                             "control": None, "control_delta": None, "loss": 1.0, "first_loss": 1.0, "num_tokens": 3,
                             "seconds": 0.1}  # fmt: skip
    return ClientOutcome(**{**facts, **changes})


def test_the_rank_that_raised_speaks_for_its_lane() -> None:
    seen = [ClientFailure(5, "not finite", 0, "a"), ClientFailure(5, "raised", 2, "b"),
            ClientFailure(5, "raised", 3, "c"),
            ClientFailure(2, "norm", 1, "d"), ClientFailure(2, "norm", 0, "e")]  # fmt: skip
    for found in (seen, seen[::-1]):
        assert [(f.client, f.reason, f.rank) for f in by_client(found)] == [(2, "norm", 0), (5, "raised", 2)]


def test_stop_names_round_rank_client_and_cause() -> None:
    check_round([], 0, 0, FailuresConfig(min_clients=3))
    with pytest.raises(RunError) as caught:
        check_round(SOME, 3, 4, FailuresConfig())
    assert str(caught.value) == (
        "client 7 failed (raised): IndexError: too far (1 more client(s) failed); set "
        "failures.on_client_error=skip to go on without a client that fails\nTraceback\n  of it"
    )
    assert in_words(caught.value.place) == "rank 1, local training, round 5, client 7"


def test_skip_needs_min_clients() -> None:
    check_round(SOME, 2, 0, SKIP)
    check_round([], 0, 0, SKIP)  # clients that only dropped out end no run
    check_round(SOME, 0, 0, FailuresConfig(on_client_error="skip", min_clients=0))
    with pytest.raises(RunError, match=r"1 client\(s\) delivered an update, fewer than failures\.min_clients=2\n"):
        check_round(SOME, 1, 0, SKIP)


def test_an_outcome_is_finite_and_within_the_bound() -> None:
    good = outcome()
    assert checked(good, 0.0) is good and checked(good, 5.0) is good
    with pytest.raises(ClientError, match=r"norm 5, more than failures\.max_update_norm=4\.99") as caught:
        checked(good, 4.99)
    assert caught.value.reason == "norm"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), "norm")
    huge = torch.full((4,), 1e30)  # whose squares are beyond fp32
    assert checked(outcome(delta=huge), 2.01e30).delta is huge
    fine = torch.zeros(2)
    for name in ("delta", "control", "control_delta"):
        for bad in (math.nan, math.inf, -math.inf):
            vectors = {"control": fine, "control_delta": fine, name: torch.tensor([0.0, bad])}
            with pytest.raises(NotFiniteError, match="client 4: its update or control variate became NaN"):
                checked(outcome(**vectors), 0.0)
