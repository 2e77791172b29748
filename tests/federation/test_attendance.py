"""Who trains in a round: keyed drop-outs and stragglers at their rates, and what the configuration refuses."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.config import FailuresConfig, load_config
from fedsim.federation.attendance import Attendance, attend

RATES = st.floats(0.0, 0.99)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 50)), st.data(), RATES, RATES, st.sampled_from(["partial", "drop"]), st.integers(2, 9))
def test_everyone_who_is_drawn_has_one_part(
    drawn: set[int], data: st.DataObject, dropout: float, straggle: float, policy: str, num_steps: int
) -> None:
    cohort = sorted(drawn)
    able = [client for client in cohort if data.draw(st.booleans())]
    failures = FailuresConfig(dropout_rate=dropout, straggler_rate=straggle, stragglers=policy)
    found = attend(cohort, able, num_steps, 4, 7, failures)
    lost = set(found.stragglers) if policy == "drop" else set()
    parts = [set(found.steps), set(found.sat_out), set(found.dropped_out), lost]
    assert sum(map(len, parts)) == len(cohort) and set().union(*parts) == drawn
    assert set(found.sat_out) == drawn - set(able) and list(found.steps) == sorted(found.steps)
    assert all(0 < steps < num_steps for steps in found.stragglers.values())
    for client, steps in found.steps.items():
        assert steps == found.stragglers.get(client, num_steps)
        alone = attend([client], [client], num_steps, 4, 7, failures)
        assert alone.steps == {client: steps}, "its draws depend on nobody else"


def test_without_rates_everyone_takes_all_steps() -> None:
    assert attend([3, 5, 8], [3, 8], 6, 2, 0, FailuresConfig()) == Attendance({3: 6, 8: 6}, [5], [], {})


def drop_outs(rate: float, seed: int = 0) -> set[tuple[int, int]]:
    """(round, client) of 2,000 chances."""
    failures, clients = FailuresConfig(dropout_rate=rate), list(range(50))
    return {(r, c) for r in range(40) for c in attend(clients, clients, 5, r, seed, failures).dropped_out}


def test_drop_outs_come_at_their_rate_and_nest() -> None:
    some, more = drop_outs(0.2), drop_outs(0.5)
    for found, rate in ((some, 0.2), (more, 0.5)):
        assert abs(len(found) - 2000 * rate) < 4 * math.sqrt(2000 * rate * (1 - rate))
    assert some < more and drop_outs(0.2, seed=1) != some


def test_stragglers_stop_anywhere_alike() -> None:
    """Each of 1 … 5 of 6 steps a fifth of the time; who straggles is drawn apart from who drops out."""
    clients = list(range(50))
    failures = FailuresConfig(straggler_rate=1.0)
    steps = Counter(n for r in range(40) for n in attend(clients, clients, 6, r, 0, failures).steps.values())
    assert set(steps) == {1, 2, 3, 4, 5}
    assert all(abs(count - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8) for count in steps.values())
    both = FailuresConfig(dropout_rate=0.5, straggler_rate=0.5)
    rounds = [attend(clients, clients, 6, r, 0, both) for r in range(40)]
    slow, reporting = sum(len(r.stragglers) for r in rounds), sum(50 - len(r.dropped_out) for r in rounds)
    assert abs(slow - reporting / 2) < 4 * math.sqrt(reporting / 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["failures.min_clients=6"], r"failures\.min_clients=6: must be <= federation\.clients_per_round \(5\); lower"),
        (["failures.straggler_rate=0.5", "local.steps=1"], r"straggler_rate=0\.5: .*local\.steps=1, and at least one"),
        (["failures.on_client_error=skip", "federation.algorithm=local"], r"on_client_error='skip': .*=local has one"),
        (["failures.dropout_rate=0.1", "federation.algorithm=centralised"], r"dropout_rate=0\.1: .*=centralised has"),
        (["failures.straggler_rate=0.1", "federation.algorithm=local"], r"leave the key at 0\.0$"),
        (["failures.on_client_error=skipp"], r"must be one of stop, skip; did you mean skip\?"),
        (["failures.dropout_rate=1"], r"failures\.dropout_rate=1\.0: must be >= 0 and < 1"),
        (["failures.max_update_norm=-1"], r"must be >= 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, words)
    load_config(None, ["federation.algorithm=local", "failures.max_update_norm=3"])  # a bound suits a lone client too
