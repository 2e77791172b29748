"""Strict parsing of JSON from other programs: any fault is one error, with its line if known."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_HALF_PAIR: Final = re.compile(r"\\u[dD][89a-fA-F]")


class NotJsonError(ValueError):
    """A text is not the JSON that fedsim takes.

    Args:
        reason: in words, without quoting the text.
        line: counted from 1; None where it is not known.
        column: likewise.
    """

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason if line is None else f"{reason}, line {line}, column {column}")
        self.reason = reason
        self.line = line
        self.column = column


def parse_json(text: str, *, nan_is_null: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON, or Python's extension of it by ``NaN`` and ``Infinity``.
        nan_is_null: take ``NaN`` for null, as pandas means it where a cell of a table is empty.

    Raises:
        NotJsonError: it is malformed, nested too deep, gives a key twice, has a number that is too
            long or half a surrogate pair, which no file and no tokenizer takes.
    """
    try:
        constant = _null_for_nan if nan_is_null else None
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
        if _HALF_PAIR.search(text):  # an escape of one; a whole pair can be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg, error.lineno, error.colno) from None
    except UnicodeEncodeError:
        raise NotJsonError("half a surrogate pair without the other half") from None
    except RecursionError:
        raise NotJsonError("nested too deep") from None
    except NotJsonError:
        raise
    except ValueError:  # Python's limit on the digits of a whole number
        raise NotJsonError("a number has too many digits") from None
    return value


def _null_for_nan(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotJsonError("an object has a key twice")
    return found
