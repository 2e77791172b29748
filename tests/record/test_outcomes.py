"""Per-item outcomes come back as they were written, and a malformed file is an error."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.record.outcomes import read_items, write_items

OUTCOMES = st.dictionaries(st.integers(0, 600), st.floats(allow_nan=False, allow_infinity=False), min_size=1)
FIGURES = st.dictionaries(st.sampled_from(["hhh_letter", "mt_bench", "xstest_safe_refused"]), OUTCOMES)


@given(FIGURES)
def test_what_is_written_is_read(figures: dict[str, dict[int, float]]) -> None:
    items = {name: dict(sorted(values.items())) for name, values in figures.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "round0-pretrained.csv"
        path.write_text("an older file", encoding="utf-8")
        write_items(path, items)
        found = read_items(path)
        assert list(Path(folder).iterdir()) == [path]
    assert list(found) == list(items)
    assert all(found[name].tolist() == list(values.values()) for name, values in items.items())


def test_the_file_is_tidy(tmp_path: Path) -> None:
    write_items(tmp_path / "a.csv", {"hhh_letter": {0: 1, 7: 0}, "mt_bench": {3: 5.5}})
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == (
        "figure,item,value\nhhh_letter,0,1.0\nhhh_letter,7,0.0\nmt_bench,3,5.5\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be figure,item,value"),
        ("item,value\n0,1\n", "first line must be figure,item,value"),
        ("figure,item,value\na,0,1\na,1\n", "line 3"),
        ("figure,item,value\na,0,1,2\n", "line 2"),
        ("figure,item,value\na,0,1\na,0,1\n", "line 3"),
        ("figure,item,value\na,-1,1\n", "line 2"),
        ("figure,item,value\na,0,nan\n", "line 2"),
        ("figure,item,value\na,0,yes\n", "line 2"),
        ("figure,item,value\n,0,1\n", "line 2"),
        ("figure,item,value\n\n", "line 2"),
    ],
)
def test_a_malformed_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_items(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "none.csv")
