"""metrics.jsonl: rows are on disk at once, floats come back bit for bit, a resume cuts what is too new."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import CheckpointError
from fedsim.base.rounds import PRETRAINED
from fedsim.record.metrics import MetricLog, NewRows, decided, read_rows


@pytest.fixture
def log(tmp_path: Path) -> MetricLog:
    return MetricLog(tmp_path / "run" / "metrics.jsonl")


def test_a_row_is_on_disk_when_append_returns(log: MetricLog) -> None:
    row = log.append(0, "train", {"client/loss": 1.5, "client/num_trained": 5})
    assert row == {"round": 1, "stage": "train", "client/loss": 1.5, "client/num_trained": 5}
    assert log.path.read_text() == json.dumps(row) + "\n"
    log.append(1, "eval", {"point": "pretrained", "eval/mt_bench": None})
    assert log.rows() == [row, {"round": 2, "stage": "eval", "point": "pretrained", "eval/mt_bench": None}]


def test_no_file_has_no_rows(log: MetricLog) -> None:
    assert log.rows() == []
    assert log.truncate_after(3) == 0


@given(st.floats(allow_nan=False))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    log = MetricLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    log.append(0, "train", {"client/loss": value})
    assert struct.pack("d", log.rows()[0]["client/loss"]) == struct.pack("d", value)


def test_nan_is_kept_as_nan(log: MetricLog) -> None:
    log.append(0, "train", {"client/loss": math.nan})
    assert math.isnan(log.rows()[0]["client/loss"])


def test_numpy_numbers_become_plain_ones(log: MetricLog) -> None:
    log.append(0, "train", {"a/x": np.float32(0.1), "a/n": np.int64(3)})
    (row,) = log.rows()
    assert row["a/x"] == float(np.float32(0.1)) and row["a/n"] == 3 and isinstance(row["a/n"], int)


def test_a_metric_may_not_overwrite_the_round(log: MetricLog) -> None:
    with pytest.raises(AssertionError, match="round"):
        log.append(0, "train", {"round": 7})


def test_truncate_after_keeps_the_round_itself_and_everything_before(log: MetricLog) -> None:
    for round_idx in (PRETRAINED, 0, 1, 2, 3):
        log.append(round_idx, "train", {"client/loss": float(round_idx)})
    assert log.truncate_after(1) == 2
    assert [row["round"] for row in log.rows()] == [0, 1, 2]
    log.append(2, "train", {"client/loss": 9.0})
    assert [row["client/loss"] for row in log.rows()] == [-1.0, 0.0, 1.0, 9.0]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_without_a_checkpoint_every_row_goes(log: MetricLog) -> None:
    log.append(PRETRAINED, "eval", {"point": "pretrained"})
    log.append(0, "round", {})
    assert log.truncate_after(None) == 2 and log.rows() == []


def test_rows_that_count_rounds_from_0_are_refused(tmp_path: Path) -> None:
    """Each round would be taken for the one before it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": -1, "stage": "eval"}\n{"round": 0, "stage": "round"}\n')
    with pytest.raises(CheckpointError, match=r"line 1: has round -1, but rounds are counted from 1 .* manifest\.json"):
        read_rows(path)


def test_truncate_after_removes_a_line_that_a_crash_cut_short(log: MetricLog) -> None:
    log.append(0, "train", {"client/loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"round": 1, "stage": "tr')
    with pytest.raises(CheckpointError, match="line 2"):
        log.rows()
    assert log.truncate_after(5) == 0
    assert [row["round"] for row in log.rows()] == [1]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"round": "1", "stage": "eval"}', '{"round": 1}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"round": 0, "stage": "eval"}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        read_rows(path)


def test_decided_drops_what_the_clock_decides_and_nothing_else() -> None:
    row = {"round": 0, "stage": "train", "client/loss": 1.0, "time/train_s": 2.0, "perf/mfu": 0.3, "parallel/idle": 0.1}
    assert decided(row) == {"round": 0, "stage": "train", "client/loss": 1.0}


@given(st.lists(st.integers(1, 60), max_size=12))
def test_following_a_file_gives_its_rows_once(steps: list[int]) -> None:
    """However the file grows between looks, also within a line or within a character of several bytes."""
    rows = [{"round": i, "stage": "train", "client/note": "é" * (i % 5)} for i in range(8)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        new = NewRows(path)
        found = new.read()
        assert found == []
        place = 0
        for step in [*steps, len(content)]:
            with path.open("ab") as file:
                file.write(content[place : place + step])
            place += step
            found += new.read()
    assert found == rows


def test_following_names_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    new = NewRows(path)
    path.write_text('{"round": 0, "stage": "eval"}\n')
    assert len(new.read()) == 1
    with path.open("a") as file:
        file.write('{"round": 1, "stage": "eval"}\nnot json\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 3"):
        new.read()
