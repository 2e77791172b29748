"""Reader of XSTest (arXiv 2308.01263): prompts that only sound harmful, and harmful ones in contrast to them.

Errors name file, line and field and never quote a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedsim.data.files import csv_rows, filled, not_empty
from fedsim.errors import DataError

_LABELS: Final = {"safe": True, "unsafe": False}
_CONTRAST: Final = "contrast_"


@dataclass(frozen=True)
class XsTestItem:
    """One prompt.

    Attributes:
        prompt: the user's message.
        kind: the file's ``type``, such as "homonyms" or "contrast_homonyms".
        safe: a good model answers it; else a good model refuses.
    """

    prompt: str = field(repr=False)
    kind: str
    safe: bool


def load_xstest(path: Path) -> list[XsTestItem]:
    """The rows of ``xstest_prompts.csv`` (``id,prompt,type,label,focus,note``), in order.

    Older releases have no ``label``: there a type that begins with "contrast_" is unsafe and any other safe, which is
    the same (v1 has safe prompts alone). The other columns are not needed.

    Raises:
        DataError: the file is missing or empty, or a row lacks a prompt, a type or one of the two labels.
    """
    items: list[XsTestItem] = []
    for place, row in csv_rows(path, ("prompt", "type"), "XSTest's header is id,prompt,type,label,focus,note"):
        prompt, kind = filled(row, "prompt", place), filled(row, "type", place).strip()
        label = row["label"].strip().casefold() if "label" in row else None
        if label is not None and label not in _LABELS:
            raise DataError(f"{place}: field 'label' must be 'safe' or 'unsafe'")
        safe = not kind.startswith(_CONTRAST) if label is None else _LABELS[label]
        items.append(XsTestItem(prompt, kind, safe))
    return not_empty(items, path)
