"""The outcome of every benchmark item at every evaluation, as tidy CSV files in a run directory: figures, no texts.

A mean over prompts hides how much of a difference the choice of prompts makes; these files let it be resampled.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedsim.errors import DataError

COLUMNS: Final = ("figure", "item", "value")
"""Name of the figure as in the metric rows, without ``eval/``; the item's place among those asked, from 0; outcome."""


def item_file(folder: Path, round_idx: int, point: str) -> Path:
    """Where a run keeps the outcomes of one evaluation; rounds are numbered from 1, the pretrained model's is 0."""
    return folder / "items" / f"round{round_idx + 1}-{point}.csv"


def write_items(path: Path, items: Mapping[str, Sequence[float]]) -> None:
    """Write the outcomes of one evaluation, whole or not at all; a file of that name is replaced.

    Args:
        items: figure → outcome of every item: 0 or 1, or points.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for figure, values in items.items():
            writer.writerows((figure, i, f"{value:.17g}") for i, value in enumerate(values))
    os.replace(partial, path)


def read_items(path: Path) -> dict[str, np.ndarray]:
    """Figure → outcome of every item, fp64 ``[num_items]``.

    Raises:
        DataError: the file cannot be read, or a line is not a figure, the next item and a finite number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); start the run again under another name") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise DataError(f"{path}: must begin with the columns {','.join(COLUMNS)}; start the run again")
    found: dict[str, list[float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            figure, item, value = line
            values = found.setdefault(figure, [])
            in_order = int(item) == len(values)
            outcome = float(value)
        except ValueError:
            in_order, outcome = False, float("nan")
        if not in_order or not np.isfinite(outcome):
            raise DataError(f"{path}, line {number}: must be a figure, its next item and a number; start the run again")
        values.append(outcome)
    return {figure: np.array(values) for figure, values in found.items()}
