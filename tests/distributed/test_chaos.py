"""Ranks are killed at random moments of every stage; the run must end as if nothing had been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos.strikes import BETWEEN, ONCE, STAGES, covered, plan

ROOT = Path(__file__).parents[2]


@pytest.mark.deep
def test_four_kills_change_nothing() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "tools/chaos/run.py",
        "--kills",
        "4",
        "--seed",
        str(random.SystemRandom().randrange(10**6)),
    ]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"{command}: {ended.stdout[-3000:]}{ended.stderr[-3000:]}"
    assert "4 kills, no fault" in ended.stdout


def test_a_plan_comes_to_every_stage_in_an_order_that_a_run_can_meet() -> None:
    rng = random.Random(0)
    strikes = [strike for _ in range(20) for strike in plan(9, {"CAI": [2.0, 1.0, 3.0]}, rng)]
    found = covered(strikes)
    assert found.pop(BETWEEN) == (0, 0)
    assert set(found) == set(STAGES) and all(one + every == 20 for one, every in found.values())
    for start in range(0, len(strikes), 9):
        part = [strike.stage for strike in strikes[start : start + 9]]
        once = [stage for stage in part if stage in ONCE]
        assert part[: len(once)] == once == sorted(once, key=list(STAGES).index)
    assert all(0 <= s.delay_s <= 2.0 and s.rank in range(6) for s in strikes)
