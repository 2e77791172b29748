"""Rows of CSV and JSON-lines files, and faults that are named without quoting the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.data.files import csv_rows, json_lines, not_empty, read_text
from fedsim.errors import DataError

SECRET = "hush-hush"


def put(folder: Path, text: str | bytes) -> Path:
    path = folder / "rows.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read_csv(path: Path) -> list[tuple[str, dict[str, str]]]:
    return list(csv_rows(path, ("a", "b"), "the header is a,b"))


def test_csv_fields_by_column_and_place(tmp_path: Path) -> None:
    path = put(tmp_path, '\ufeffa,b,c\n1,"two\nlines",x\n3\n')
    assert read_csv(path) == [
        (f"{path}, line 3", {"a": "1", "b": "two\nlines", "c": "x"}),
        (f"{path}, line 4", {"a": "3", "b": "", "c": ""}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a,c\n{SECRET},2\n", "line 1: no column 'b'; the header is a,b"),
        ("", "line 1: no column 'a'"),
        (f"a,b\n1,2\n1,{SECRET},{SECRET}\n", "line 3: more fields than the header"),
        (f"a,b\n{SECRET * 20_000},2\n", r"line 2: not CSV \(field larger"),
        (b"a,b\n1,2\n\xff,2\n", "line 3: not UTF-8"),
    ],
)
def test_faults_of_a_csv_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_csv(put(tmp_path, text))
    assert "rows.txt" in str(caught.value) and SECRET not in str(caught.value) and caught.value.__cause__ is None


def test_json_objects_by_line_and_their_faults(tmp_path: Path) -> None:
    assert list(json_lines(put(tmp_path, '{"a": 1}\n\n{"a": "\u2028"}\n'))) == [(1, {"a": 1}), (3, {"a": "\u2028"})]
    for text, message in (
        ('\n{"a": hush-hush}\n', "line 2: not JSON"),
        ('"hush-hush"', "line 1: must be a JSON object"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(json_lines(put(tmp_path, text)))
        assert SECRET not in str(caught.value)


def test_a_file_that_is_not_there_and_one_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no rows"):
        not_empty([], tmp_path)
    assert not_empty([1], tmp_path) == [1]
