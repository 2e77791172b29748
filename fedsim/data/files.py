"""Readers of rows in text files: CSV, JSON arrays and JSON lines.

Files are read whole. Errors name file and line and never quote a text of the file.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from fedsim.base.errors import DataError
from fedsim.base.json_text import NotJsonError, parse_json

Item = TypeVar("Item")

JSON_ROWS: Final = "a JSON array of objects, or JSON lines (one object a line)"
"""The two forms of JSON rows, as errors name them."""

SEPARATORS: Final = ",;\t"
"""Separators of CSV columns; spreadsheets of many countries write semicolons."""

_MISSING: Final = frozenset({"", "nan", "none", "null", "<na>", "n/a"})
"""Texts that pandas and spreadsheets write for an empty cell, in lower case."""

#: Pattern of the first bytes of files of other forms, name of the form, and fix.
_OTHER_FORMS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), name, fix)
    for pattern, name, fix in (
        (rb"PAR1", "a Parquet file", "write its rows in that form"),
        (rb"ARROW1", "an Arrow file", "write its rows in that form"),
        (
            rb"PK\x03\x04",
            "a zip archive or an Excel workbook",
            "unpack it, or save the sheet in that form",
        ),
        (rb"\xd0\xcf\x11\xe0", "an Excel workbook", "save the sheet in that form"),
        (rb"\x1f\x8b", "compressed by gzip", "unpack it"),
        (rb"BZh[1-9]1AY", "compressed by bzip2", "unpack it"),
        (rb"\xfd7zXZ\x00", "compressed by xz", "unpack it"),
        (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it"),
        (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "UTF-16 or UTF-32 text", "save it as UTF-8"),
        (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself (git lfs pull)"),
        (rb"\s*<(!doctype|html)", "a web page", "download the file itself (GitHub: the raw file)"),
    )
)


def csv_rows(
    path: Path,
    columns: Sequence[str],
    header: str,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place as ``FILE, line N``, fields by column) of each row; missing fields are empty.

    Columns may be separated by commas, semicolons or tabs: the header decides. Further columns,
    such as an index, do no harm.

    Args:
        path: a CSV file whose first line names the columns.
        columns: those that must be there.
        header: the format's usual header, for the error.

    Raises:
        DataError: the file cannot be read, lacks a column or has it twice, or a row has more fields
            than the header.
    """
    text = read_text(path, "CSV")
    reader = _reader(text, SEPARATORS[0])
    try:
        # The first separator by which the header has all columns.
        separator = next((s for s in SEPARATORS if _has(_reader(text, s), columns)), SEPARATORS[0])
        reader = _reader(text, separator)
        names = list(reader.fieldnames or ())
        for column in columns:
            if column not in names:
                raise DataError(f"{path}, line 1: no column {column!r}; {header} (CSV, UTF-8)")
            if names.count(column) > 1:
                raise DataError(f"{path}, line 1: two columns are named {column!r}; leave one")

        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{place}: more fields than the header; quote texts with {separator!r}",
                )
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def json_rows(path: Path, field: str) -> list[tuple[str, dict[str, Any]]]:
    """Read (place as ``FILE, row N`` or ``FILE, line N``, object) of each row, in order.

    The file is a JSON array of objects, or has one object a line, blank lines aside. ``NaN`` is
    null.

    Args:
        path: a JSON file of either form.
        field: one that every row has; a lone object without it, or with an object there, is no row.

    Raises:
        DataError: the file cannot be read, is neither form, or a row is no object.
    """
    text = read_text(path, JSON_ROWS)
    # Values with their places, from either form.
    values: list[tuple[str, Any]] = []
    if text.lstrip()[:1] == "[":
        for number, value in enumerate(_parse(text, path), start=1):
            values.append((f"{path}, row {number}", value))
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                values.append((f"{path}, line {number}", _parse(line, path, number)))

    # Each must be an object.
    rows: list[tuple[str, dict[str, Any]]] = []
    for place, value in values:
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise DataError(f"{place}: must be a JSON object, is {kind}; give {JSON_ROWS}")
        rows.append((place, value))
    # A single object may hold all rows, by column or by name.
    if len(rows) == 1 and isinstance(rows[0][1].get(field, {}), dict):
        raise DataError(
            f"{rows[0][0]}: is one object and no row with {field!r}; the file must be {JSON_ROWS} "
            "(pandas: to_json(orient='records'))"
        )
    return rows


def json_object(path: Path, form: str) -> dict[str, Any]:
    """Read the object that a whole JSON file holds; errors name ``form`` as what it must be.

    Raises:
        DataError: the file cannot be read or is no JSON object.
    """
    text = read_text(path, form)
    try:
        value = parse_json(text)
    except NotJsonError as error:
        line = ""
        if error.line is not None:
            line = f", line {error.line}"
        raise DataError(f"{path}{line}: not JSON ({error.reason}); must be {form}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be {form}, is {type(value).__name__}")
    return value


def filled(row: Mapping[str, str], column: str, place: str) -> str:
    """Read a field of a CSV row that needs text.

    Raises:
        DataError: it is empty, or a word for empty (``nan``, ``None``).
    """
    if is_missing(row[column]):
        raise DataError(
            f"{place}: field {column!r} is empty (or 'nan', 'None'); every row needs text",
        )
    return row[column]


def is_missing(value: object) -> bool:
    """True if a value means none: null, an empty text, or a word for an empty cell (``nan``)."""
    return value is None or (isinstance(value, str) and value.strip().casefold() in _MISSING)


def read_text(path: Path, form: str = "text") -> str:
    """Read a file as UTF-8, with or without a byte-order mark; errors name the wanted ``form``.

    Raises:
        DataError: it cannot be read, is of another form (compressed, Parquet, UTF-16) or is not
            UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror
        raise DataError(
            f"{path}: cannot be read ({reason}); give the path of an existing file",
        ) from None
    # Another form, by its first bytes.
    for start, name, fix in _OTHER_FORMS:
        if start.match(raw):
            raise DataError(f"{path}: is {name}, and must be {form}; {fix}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: holds a NUL character; save the file as UTF-8 text")
    return text


def not_empty(items: list[Item], path: Path) -> list[Item]:
    """Check that a file holds items, and return them.

    Raises:
        DataError: there are none.
    """
    if not items:
        raise DataError(f"{path}: holds no rows; give a file with at least one")
    return items


def _reader(text: str, separator: str) -> csv.DictReader[str]:
    """CSV reader of a text with this separator."""
    lines = io.StringIO(text, newline="")
    return csv.DictReader(lines, restval="", strict=True, delimiter=separator)


def _has(reader: csv.DictReader[str], columns: Sequence[str]) -> bool:
    """True if the header has all ``columns``."""
    return set(columns) <= set(reader.fieldnames or ())


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """Parse a JSON text, which is the whole file or its line ``line``."""
    try:
        return parse_json(text, nan_is_null=True)
    except NotJsonError as error:
        # Line and column, as far as they are known.
        if line is None:
            line = error.line
        place = str(path)
        if line is not None:
            place += f", line {line}"
        reason = error.reason
        if error.column is not None:
            reason += f", column {error.column}"
        raise DataError(f"{place}: not JSON ({reason}); must be {JSON_ROWS}") from None
