"""Reader of SQuARe-format response files (Lee et al., ACL 2023).

A file is a JSON array of rows with ``question``, ``question_en``, ``response``, ``response_en``: str; ``acceptable?``:
0 (red) or 1; ``category``: list of 1–2 strings; ``question_category``: str.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.data.files import json_file
from fedsim.errors import DataError

_LABELS = {0: False, 1: True, "0": False, "1": True}  # True and False equal 1 and 0


@dataclass(frozen=True)
class SquareRow:
    """One response.

    Attributes:
        row_id: position in the file, from 0.
        prompt: the question.
        response: what somebody answered.
        red: the response is labelled not acceptable.
        categories: SQuARe's tags of the response.
        question_category: SQuARe's tag of the question; "" where there is none.
        weight: how much the row counts in a client's training, 0 to 1 (see guard.action=downweight); no part of a file.
    """

    row_id: int
    prompt: str
    response: str
    red: bool
    categories: tuple[str, ...]
    question_category: str
    weight: float = 1.0


@dataclass(frozen=True)
class SquareFile:
    """The rows of a file, and how many were dropped for a label other than 0 or 1."""

    rows: list[SquareRow]
    num_bad_labels: int

    @property
    def num_red(self) -> int:
        """Rows labelled red."""
        return sum(r.red for r in self.rows)

    @property
    def num_acceptable(self) -> int:
        """Rows labelled acceptable."""
        return len(self.rows) - self.num_red


def load_square(path: Path, language: str = "en") -> SquareFile:
    """Read and check a file; ``language`` "en" takes the ``_en`` fields, "ko" the others.

    Raises:
        DataError: a missing or malformed file, with row and field.
    """
    fields = ("question_en", "response_en") if language == "en" else ("question", "response")
    rows: list[SquareRow] = []
    bad = 0
    for index, entry in enumerate(_entries(path)):
        place = f"{path}, row {index + 1}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: must be an object, is {type(entry).__name__}; expected SQuARe's response format")
        prompt, response = (_text(entry, name, place) for name in fields)
        label = entry.get("acceptable?")
        if isinstance(label, float | int | str) and label in _LABELS:
            category, kind = _categories(entry, place), entry.get("question_category")
            rows.append(SquareRow(index, prompt, response, not _LABELS[label], category, str(kind or "")))
        else:
            bad += 1
    if not rows:
        raise DataError(f"{path}: holds no row labelled 0 or 1 in 'acceptable?'; is it a SQuARe response file?")
    return SquareFile(rows, bad)


def to_arrow(rows: list[SquareRow], path: Path) -> None:
    """Write rows as an Arrow file that :func:`from_arrow` maps into memory."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    text = Value("string")  # types are declared: guessed ones fail where the first rows have no category
    columns = {"row_id": Value("int64"), "prompt": text, "response": text, "red": Value("bool")}
    features = Features(columns | {"categories": List(text), "question_category": text})
    with ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            writer.write({name: getattr(row, name) for name in features})
        writer.finalize()


def from_arrow(path: Path) -> ArrowRows:
    """Rows of an Arrow file, mapped into memory: nothing is read before it is asked for."""
    from datasets import Dataset

    return ArrowRows(Dataset.from_file(str(path)))


class ArrowRows:
    """Memory-mapped rows by position."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def take(self, positions: list[int]) -> list[SquareRow]:
        """Rows at these positions, in this order."""
        columns = self._table[positions]
        names = ("row_id", "prompt", "response", "red", "categories", "question_category")
        return [
            SquareRow(i, p, r, red, tuple(c), q)
            for i, p, r, red, c, q in zip(*(columns[n] for n in names), strict=True)
        ]


def _entries(path: Path) -> list[Any]:
    content = json_file(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: must be a JSON array of rows, is {type(content).__name__}")
    return content


def _text(entry: dict[str, Any], name: str, place: str) -> str:
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if name.endswith("_en") and name not in entry and isinstance(entry.get(name.removesuffix("_en")), str):
        raise DataError(f"{place}: has no English text ({name}); translate the file, or set data.language=ko")
    raise DataError(f"{place}: field {name!r} must be text, is {type(value).__name__}")


def _categories(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    value = entry.get("category", [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise DataError(f"{place}: field 'category' must be a list of strings, is {value!r}")
    return tuple(value)
