"""Rows by seed: outcomes as one word, files that come back as they were, and damage that is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.study.seed_rows import HEAD, SeedRow, decode, encode, read_seed_rows, write_seed_rows


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_any_outcomes_come_back(outcomes: list[float]) -> None:
    assert decode(encode(outcomes)).tolist() == outcomes


@given(st.lists(st.integers(0, 35).map(lambda half: half / 2), min_size=1))
def test_halves_are_one_digit_each(outcomes: list[float]) -> None:
    text = encode(outcomes)
    assert len(text) == len(outcomes) and decode(text).tolist() == outcomes


def test_a_file_comes_back(tmp_path: Path) -> None:
    flags = np.array([1.0, 0.0, 0.5, 1.0])
    rows = [
        SeedRow("fedavg", "FL", 3, "hhh_letter", 62.5, 4, "0123456789", flags),
        SeedRow("fedavg", "FL", 3, "mt_bench", 6.53, 80, "0123456789"),
    ]
    write_seed_rows(tmp_path / "rows.csv", rows)
    text = (tmp_path / "rows.csv").read_text(encoding="utf-8")
    assert text.splitlines()[1] == "fedavg,FL,3,hhh_letter,62.5,4,0123456789,2012"
    found = read_seed_rows(tmp_path / "rows.csv")
    assert found[1] == rows[1] and found[0].outcomes is not None and found[0].outcomes.tolist() == flags.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fedavg,FL,3,hhh_letter,62.5,4,abc,2022", r"line 2: its outcomes do not give 62\.5"),
        ("fedavg,FL,3,hhh_letter,62.5,5,abc,2012", r"line 2: its outcomes do not give 62\.5"),
        ("fedavg,FL,3,hhh_letter,62.5,4,abc", "line 2: is not a row of"),
        ("fedavg,FL,x,hhh_letter,62.5,4,abc,", "line 2: is not a row of"),
        ("fedavg,FL,3,hhh_letter,62.5,4,abc,2-12", "line 2: is not a row of"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(HEAD) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_seed_rows(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="its first line must be"):
        read_seed_rows(tmp_path / "x.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_seed_rows(tmp_path / "y.csv")
