"""Rows of CSV and JSON-lines files, and faults that are named without quoting the data."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from fedsim.base.errors import DataError
from fedsim.data.files import csv_rows, json_object, json_rows, not_empty, read_text

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
        (f"a;b\n1;2\n1;{SECRET};{SECRET}\n", "line 3: more fields than the header; quote texts with ';'"),
        (f"a,b,a\n1,{SECRET},2\n", "line 1: two columns are named 'a'"),
        (f'[{{"a": "{SECRET}"}}]', "line 1: no column 'a'; the header is a,b .CSV"),
        (f"a,b\n{SECRET * 20_000},2\n", r"line 2: not CSV \(field larger"),
        (b"a,b\n1,2\n\xff,2\n", "line 3: not UTF-8"),
    ],
)
def test_faults_of_a_csv_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_csv(put(tmp_path, text))
    assert "rows.txt" in str(caught.value) and SECRET not in str(caught.value) and caught.value.__cause__ is None


def test_json_objects_by_line_and_their_faults(tmp_path: Path) -> None:
    path = put(tmp_path, '{"a": 1}\n\n{"a": "\u2028", "b": NaN}\n')
    assert json_rows(path, "a") == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 3", {"a": "\u2028", "b": None}),
    ]
    put(tmp_path, '\ufeff\n[{"a": 1},\n\n{"a": "\u2028"}]\n')
    assert json_rows(path, "a") == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": "\u2028"})]
    assert json_rows(put(tmp_path, "[]"), "a") == json_rows(put(tmp_path, " \n"), "a") == []
    for text, message in (
        ('\n{"a": hush-hush}\n', "line 2: not JSON .*; must be a JSON array of objects, or JSON lines"),
        ('"hush-hush"', "line 1: must be a JSON object, is str; give a JSON array of objects, or JSON lines"),
        ('[{"a": 1},\n"hush-hush"]', "row 2: must be a JSON object, is str; give a JSON array"),
        ('[{"a": 1},\n{"a": hush-hush]', "line 2: not JSON .*; must be a JSON array of objects, or JSON lines"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: not JSON .Extra data"),
        ('{\n"a": "hush-hush"\n}', "line 1: not JSON .*; must be a JSON array of objects, or JSON lines"),
        ('{"rows": ["hush-hush"]}', "line 1: is one object and no row with 'a'; the file must be a JSON array"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            json_rows(put(tmp_path, text), "a")
        assert SECRET not in str(caught.value)


def test_a_whole_object(tmp_path: Path) -> None:
    assert json_object(put(tmp_path, '{"a":\n1}'), "one kite") == {"a": 1}
    for text, message in (
        ('{"a": 1}\n{"a": 2}', "line 2: not JSON .*; must be one kite"),
        ("[]", "must be one kite, is list"),
    ):
        with pytest.raises(DataError, match=message):
            json_object(put(tmp_path, text), "one kite")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1\x15", "is a Parquet file, and must be FORM.*; write its rows in that form"),
        (b"ARROW1\x00", "is an Arrow file, "),
        (b"PK\x03\x04\x14", "is a zip archive or an Excel workbook, .*save the sheet in that form"),
        (b"\xd0\xcf\x11\xe0", "is an Excel workbook, "),
        (gzip.compress(b"a,b", mtime=0), "is compressed by gzip, and must be FORM.*; unpack it"),
        (bz2.compress(b"a,b"), "is compressed by bzip2, "),
        (lzma.compress(b"a,b"), "is compressed by xz, "),
        (b"\x28\xb5\x2f\xfd\x04", "is compressed by zstd, "),
        ("a,b\n1,2".encode("utf-16"), "is UTF-16 or UTF-32 text, .*; save it as UTF-8"),
        ("a,b\n1,2".encode("utf-32"), "is UTF-16 or UTF-32 text, "),
        ("a,b\n1,2".encode("utf-16-le"), "line 1: holds a NUL character; save the file as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, .*git lfs pull"),
        (b"\n<!DOCTYPE html>", "is a web page, "),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = put(tmp_path, data)
    calls = (
        ("CSV", lambda: read_csv(path)),
        ("a JSON array of objects, or JSON lines", lambda: json_rows(path, "a")),
        ("one kite", lambda: json_object(path, "one kite")),
    )
    for form, call in calls:
        with pytest.raises(DataError, match=message.replace("FORM", form)):
            call()


@pytest.mark.parametrize(
    "text",
    [
        "a;b;c\r\n1;2,5;x\r\n",
        "a\tb\tc\n1\t2,5\tx\n",
        'a,b,c\n1,"2,5",x\n',
        'c,Unnamed: 0,b,a\nx,0,"2,5",1\n',
    ],
)
def test_the_header_decides_how_columns_are_separated(tmp_path: Path, text: str) -> None:
    ((_, row),) = read_csv(put(tmp_path, text))
    assert (row["a"], row["b"], row["c"]) == ("1", "2,5", "x")


def test_a_file_that_is_not_there_and_one_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no rows"):
        not_empty([], tmp_path)
    assert not_empty([1], tmp_path) == [1]
