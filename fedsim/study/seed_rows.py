"""Figures of a study by seed, as a CSV file that is committed and that its tables are made from.

A row is one figure of one arm under one seed: its value, the number of its items, the outcome of
each of them where they are kept, and the commit that measured it. Intervals and paired differences
follow from these rows only.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedsim.base.errors import DataError

HEAD: Final = ["aggregation", "method", "seed", "figure", "value", "count", "commit", "outcomes"]

_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class SeedRow:
    """One figure of one arm under one seed.

    Attributes:
        aggregation: ``federation.algorithm``.
        method: as :mod:`fedsim.study.paper_claims` names it.
        seed: of the run.
        figure: its name in the metric rows or item files.
        value: in percent or points.
        count: items behind it.
        commit: of the fedsim that measured it.
        outcomes: fp64 ``[count]``, in the order of the benchmark's file (0 or 1, or points); None
            where not kept.
    """

    aggregation: str
    method: str
    seed: int
    figure: str
    value: float
    count: int
    commit: str
    outcomes: np.ndarray | None = None


def encode(outcomes: Sequence[float]) -> str:
    """Outcomes as text: a base-36 digit each where all are halves from 0 to 17.5; else with spaces.

    ``1 0 0.5`` becomes ``201``, and 520 outcomes stay one word.
    """
    # Digits, where all outcomes are small multiples of a half.
    halves = [2 * float(outcome) for outcome in outcomes]
    if all(half.is_integer() and 0 <= half < len(_DIGITS) for half in halves):
        return "".join(_DIGITS[int(half)] for half in halves)

    # Decimal numbers, else; a single one such as 5e-324 must not read as digits.
    text = " ".join(repr(float(outcome)) for outcome in outcomes)
    if "." in text or " " in text:
        return text
    return f"{text} "


def decode(text: str) -> np.ndarray:
    """The inverse of :func:`encode`, fp64 ``[num_items]``.

    Raises:
        ValueError: the text is none of :func:`encode`.
    """
    if "." in text or " " in text:
        return np.array([float(word) for word in text.split()], dtype=np.float64)
    return np.array([_DIGITS.index(digit) / 2 for digit in text], dtype=np.float64)


def write_seed_rows(path: Path, rows: Iterable[SeedRow]) -> None:
    """Write the CSV file, in the order given."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        for row in rows:
            outcomes = ""
            if row.outcomes is not None:
                outcomes = encode(row.outcomes.tolist())
            fields = [
                row.aggregation,
                row.method,
                row.seed,
                row.figure,
                repr(row.value),
                row.count,
                row.commit,
            ]
            writer.writerow([*fields, outcomes])


def read_seed_rows(path: Path) -> list[SeedRow]:
    """Read what :func:`write_seed_rows` wrote.

    Raises:
        DataError: the file is missing or malformed, or outcomes do not give the value beside them.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); restore it, or make the table again",
        ) from error
    if not lines or lines[0] != HEAD:
        raise DataError(f"{path}: its first line must be {','.join(HEAD)}; make the table again")
    return [_row(path, number, line) for number, line in enumerate(lines[1:], start=2)]


def _row(path: Path, number: int, line: Sequence[str]) -> SeedRow:
    try:
        aggregation, method, seed, figure, value, count, commit, text = line
        outcomes = decode(text) if text else None
        row = SeedRow(
            aggregation,
            method,
            int(seed),
            figure,
            float(value),
            int(count),
            commit,
            outcomes,
        )
    except ValueError as error:
        raise DataError(
            f"{path}, line {number}: is not a row of {','.join(HEAD)}; make the table again",
        ) from error
    if row.outcomes is not None and not _gives(row.outcomes, row):
        raise DataError(
            f"{path}, line {number}: its outcomes do not give {row.value!r}; make the table again",
        )
    return row


def _gives(outcomes: np.ndarray, row: SeedRow) -> bool:
    """Compare outcomes with the row's count and mean, as points or in percent."""
    mean = float(outcomes.mean())
    # Rows of points, and shares in percent.
    close = [math.isclose(unit * mean, row.value, rel_tol=1e-9, abs_tol=1e-12) for unit in (1, 100)]
    return len(outcomes) == row.count and any(close)
