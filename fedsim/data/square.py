"""Reader of SQuARe-format response files (Lee et al., ACL 2023).

A file holds rows, as a JSON array or one object a line, with ``question``, ``question_en``,
``response``, ``response_en``: str; ``acceptable?``: 0 (red) or 1; ``category``: list of 1–2
strings; ``question_category``: str.

Files that went through pandas or a spreadsheet are read too, where they are unambiguous:

- no category: absent, null, NaN, ``""``, ``"nan"``, ``"None"`` and the like, also inside a list;
- categories: a list of texts; a text, which is one category; a list printed as text (``"['a',
  'b']"``). A text with a comma, semicolon or bar may be one category or several, and is refused;
- labels: 0 and 1 as numbers, truth values, or text (``"1.0"``, ``"TRUE"``). Rows with another label
  are dropped and counted.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import DataError
from fedsim.data.files import is_missing, json_rows

_LABELS: Final = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""Truth of "acceptable", by the label as text in lower case."""

_QUOTED: Final = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PRINTED_LIST: Final = re.compile(
    rf"[\[(]\s*(?:{_QUOTED}\s*(?:,\s*{_QUOTED}\s*)*,?\s*)?[\])]",
    re.DOTALL,
)
"""A list or tuple of texts as Python or JSON prints it; numpy's, which has no commas, is none."""


@dataclass(frozen=True)
class SquareRow:
    """One response.

    Attributes:
        row_id: position in the file, from 0.
        prompt: the question.
        response: an answer to it.
        red: the response is labelled not acceptable.
        categories: SQuARe's tags of the response.
        question_category: SQuARe's tag of the question; "" where there is none.
        weight: of the row in a client's training, 0 to 1 (see guard.action=downweight); not read
            from a file.
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
    """Rows of a file, and the numbers of dropped ones.

    Attributes:
        rows: usable rows.
        num_bad_labels: dropped rows whose label is neither 0 nor 1.
        num_blank_questions: dropped rows with a good label and nothing but white space for a
            question. A blank response stays: CAI uses only the question, and other stages drop and
            count the row.
    """

    rows: list[SquareRow]
    num_bad_labels: int
    num_blank_questions: int

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
    fields = ("question", "response")
    if language == "en":
        fields = ("question_en", "response_en")
    rows: list[SquareRow] = []
    bad = blank = 0
    for index, (place, entry) in enumerate(json_rows(path, "acceptable?")):
        prompt, response = (_text(entry, name, place) for name in fields)
        # The label; a row without a known one, or without a question, is dropped and counted.
        label = entry.get("acceptable?")
        acceptable = None
        if isinstance(label, float | int | str):
            acceptable = _LABELS.get(str(label).strip().casefold())
        if acceptable is None:
            bad += 1
            continue
        if not prompt.strip():
            blank += 1
            continue
        categories = _categories(entry, "category", place)
        kinds = _categories(entry, "question_category", place, single=True)
        kind = ", ".join(kinds)
        rows.append(SquareRow(index, prompt, response, not acceptable, categories, kind))

    # Nothing left: which field is to blame?
    if not rows and blank:
        raise DataError(
            f"{path}: the question of every labelled row is blank (field {fields[0]!r}); see "
            "data.language, or give a file with questions"
        )
    if not rows:
        fault = "holds no row labelled 0 or 1 in 'acceptable?' (or false and true)"
        raise DataError(f"{path}: {fault}; is it a SQuARe response file?")
    return SquareFile(rows, bad, blank)


def to_arrow(rows: list[SquareRow], path: Path) -> None:
    """Write rows as an Arrow file that :func:`from_arrow` maps into memory."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    # Types are declared: guessed ones fail where the first rows have no category.
    text = Value("string")
    columns = {"row_id": Value("int64"), "prompt": text, "response": text, "red": Value("bool")}
    features = Features(columns | {"categories": List(text), "question_category": text})
    with ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            writer.write({name: getattr(row, name) for name in features})
        writer.finalize()


def from_arrow(path: Path) -> ArrowRows:
    """Rows of an Arrow file, mapped into memory and read on access."""
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
        rows = []
        for i in range(len(positions)):
            rows.append(
                SquareRow(
                    row_id=columns["row_id"][i],
                    prompt=columns["prompt"][i],
                    response=columns["response"][i],
                    red=columns["red"][i],
                    categories=tuple(columns["categories"][i]),
                    question_category=columns["question_category"][i],
                )
            )
        return rows


def _text(entry: dict[str, Any], name: str, place: str) -> str:
    """Read a text field of a row."""
    value = entry.get(name)
    if isinstance(value, str):
        return value
    korean = entry.get(name.removesuffix("_en"))
    if name.endswith("_en") and name not in entry and isinstance(korean, str):
        fix = "translate the file, or set data.language=ko"
        raise DataError(f"{place}: has no English text ({name}); {fix}")
    raise DataError(f"{place}: field {name!r} must be text, is {type(value).__name__}")


def _categories(
    entry: dict[str, Any],
    name: str,
    place: str,
    *,
    single: bool = False,
) -> tuple[str, ...]:
    """Read the categories of a field, by the rules of the module's docstring.

    Args:
        entry: a row.
        name: of the field.
        place: of the row, for the error.
        single: a text is one category even if it has a comma in it.
    """
    value = entry.get(name)
    if is_missing(value):
        return ()
    try:
        found = _texts(value, single)
    except ValueError as error:
        raise DataError(
            f"{place}: field {name!r} must be a list of texts, or a text that is one category "
            f"(null and NaN are none); {error}"
        ) from None
    return tuple(text.strip() for text in found if not is_missing(text))


def _texts(value: Any, single: bool) -> list[str]:
    """Read the texts of a field's value.

    Raises:
        ValueError: they are ambiguous; it gives the reason.
    """
    # A text: a printed list, or one category.
    if isinstance(value, str):
        text = value.strip()
        if text[0] in "[({\"'":
            return _printed_list(text)
        separators = [sign for sign in ",;|" if sign in text]
        if separators and not single:
            raise ValueError(f"a text with {separators[0]!r} may be one or several: write a list")
        return [text]

    # A list of texts, in which null is none.
    if not isinstance(value, list):
        raise ValueError(f"it is {type(value).__name__}")
    texts = [item for item in value if item is not None]
    for item in texts:
        if not isinstance(item, str):
            raise ValueError(f"the list holds {type(item).__name__}")
        if item.lstrip().startswith("["):
            raise ValueError("the list holds a list as text")
    return texts


def _printed_list(text: str) -> list[str]:
    """Parse a list of texts that was printed as text.

    Raises:
        ValueError: it is no such list.
    """
    found = None
    if _PRINTED_LIST.fullmatch(text):
        try:
            found = ast.literal_eval(text)
            "".join(found).encode()  # half a surrogate pair is no text
        except (ValueError, SyntaxError):
            found = None
    if not isinstance(found, list | tuple):
        raise ValueError(
            "the text begins like a list, and is none of quoted texts with commas between them",
        )
    return list(found)
