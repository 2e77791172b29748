"""Rows, their file, their table, and the timing they come from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedsim.study.bench_rows import Correctness, Percentiles, Row, StageResult, Target
from tools.bench.measure import percentiles, take_turns
from tools.bench.table import table

ROW = Row(
    "local_step",
    "25 steps",
    "float32",
    {"batch": 16, "lengths": [3, 4]},
    Percentiles(0.9, 1.0, 1.2),
    repeats=20,
    peer="TRL",
    peer_seconds=Percentiles(1.9, 2.5, 2.6),
    figures={"tokens_per_s": 12.5},
    target=Target("ratio", 1.8),
    floor_s=0.25,
    floor="4N a token",
)


def changed(**changes: object) -> Row:
    """The row above with other values."""
    return Row(**{**ROW.__dict__, **changes})


def test_percentiles_interpolate() -> None:
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Percentiles(2.0, 3.5, 5.0)
    assert percentiles([7.0]) == Percentiles(7.0, 7.0, 7.0)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    plain = Row("local_step", "a share", "float32", {}, figures={"idle": 0.07}, target=Target("idle", 0.08, True))
    result = StageResult("local_step", {"threads": 2, "commit": None}, [Correctness("loss", 1e-6, 1e-5)], [ROW, plain])
    path = tmp_path / "cpu" / "local_step.json"
    result.write(path)
    assert StageResult.read(path) == result
    assert '"ratio": 2.5' in path.read_text() and '"fraction_of_floor": 0.25' in path.read_text()


def test_what_follows_from_a_row() -> None:
    assert ROW.ratio == 2.5 and ROW.fraction_of_floor == 0.25 and ROW.reached is True
    assert changed(target=Target("ratio", 2.6)).reached is False
    assert changed(target=Target("p50_s", 0.9, at_most=True)).reached is False
    assert changed(target=Target("tokens_per_s", 12.0)).reached is True
    assert changed(peer_seconds=None).reached is None and changed(target=None).reached is None


@pytest.mark.parametrize(("error", "passed"), [(1.0, True), (1.1, False), (math.nan, False)])
def test_a_check_passes_up_to_its_limit(error: float, passed: bool) -> None:
    assert Correctness("x", error, 1.0).passed is passed


def test_the_table_has_a_line_a_row() -> None:
    absent = changed(peer_seconds=None, peer_absent="not installed")
    lines = table([StageResult("local_step", {}, [], [ROW, absent])]).plain().splitlines()
    assert len(lines) == 4
    assert "2.50 x" in lines[2] and "ratio ≥ 1.8: reached" in lines[2] and "25 %" in lines[2] and "250 ms" in lines[2]
    assert "not installed" in lines[3] and "reached" not in lines[3]


def test_calls_take_turns_and_warm_ups_do_not_count() -> None:
    made: list[str] = []
    calls = {"a": lambda: made.append("a"), "b": lambda: made.append("b")}
    found = take_turns(calls, torch.device("cpu"), repeats=3, warmups=1)
    assert "".join(made) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_the_budget_ends_the_turns_but_not_before_the_least() -> None:
    made: list[int] = []
    take_turns({"a": lambda: made.append(1)}, torch.device("cpu"), repeats=9, warmups=0, budget_s=0.0, least=2)
    assert len(made) == 2
