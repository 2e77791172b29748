"""Text files of rows, CSV or JSON lines, read whole; errors name file and line and never quote what stands there."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedsim.errors import DataError
from fedsim.json_text import NotJsonError, parse_json

Item = TypeVar("Item")


def csv_rows(path: Path, columns: Sequence[str], header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(place as ``FILE, line N``, fields by column) of each row; a field that the row lacks is empty.

    Args:
        path: a CSV file whose first line names the columns.
        columns: those that must be there.
        header: the format's usual header, for the error.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row has more fields than the header.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="", strict=True)
    try:
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise DataError(f"{path}, line 1: no column {column!r}; {header}")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{place}: more fields than the header; quote texts with commas")
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line number, object) of each line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except NotJsonError as error:
            column = "" if error.column is None else f", column {error.column}"
            raise DataError(f"{path}, line {number}: not JSON ({error.reason}{column})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: must be a JSON object")
        yield number, record


def json_file(path: Path) -> Any:
    """The value that a whole JSON file holds.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    try:
        return parse_json(read_text(path))
    except NotJsonError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise DataError(f"{path}{line}: is not valid JSON ({error.reason})") from None


def read_text(path: Path) -> str:
    """The file as UTF-8, with or without a byte-order mark.

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of an existing file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def not_empty(items: list[Item], path: Path) -> list[Item]:
    """The items of ``path``.

    Raises:
        DataError: there are none.
    """
    if not items:
        raise DataError(f"{path}: holds no rows; give a file with at least one")
    return items
