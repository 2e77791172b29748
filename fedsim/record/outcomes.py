"""Outcomes of an evaluation by item as a tidy CSV: figure, item, value.

They allow statistics that resample a benchmark's items. No text is in them.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedsim.base.errors import DataError

HEAD: Final = ["figure", "item", "value"]

FIX: Final = "give a file of a run's items/ folder"


def item_file(folder: Path, number: int, point: str) -> Path:
    """Return the path of the items of one evaluation in a run directory.

    Args:
        number: of the round, from 1; 0 is the pretrained model's.
        point: evaluation point.
    """
    return folder / "items" / f"round{number}-{point}.csv"


def write_items(path: Path, items: Mapping[str, Mapping[int, float]]) -> None:
    """Write or replace a file of items; a reader sees the old file or the whole new one.

    Args:
        path: in a folder that exists.
        items: figure → place in the benchmark's file, from 0 and ascending → outcome (0 or 1, or
            points).
    """
    # The new file is on disk before it replaces the old one.
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEAD)
        for figure, values in items.items():
            assert list(values) == sorted(values), "items are in the order of their file"
            writer.writerows([figure, place, repr(float(value))] for place, value in values.items())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def read_items(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read outcomes by figure, each fp64 ``[num_items]`` in the order of the benchmark's file.

    Raises:
        DataError: the file is missing, cut short, or is not one of :func:`write_items`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            text = stream.read()
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {FIX}") from error
    if not lines or lines[0] != HEAD:
        raise DataError(f"{path}: its first line must be {','.join(HEAD)}; {FIX}")
    if not text.endswith("\n"):
        raise DataError(f"{path}, line {len(lines)}: ends within the line; measure the run again")
    # Figure → place → outcome; places ascend, so that the last one is the greatest.
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            figure, place, value = line[0], int(line[1]), float(line[2])
            is_right = len(line) == 3 and figure != "" and math.isfinite(value)
            values = found.setdefault(figure, {})
            is_right = is_right and place > next(reversed(values), -1)
        except (ValueError, IndexError):
            is_right = False
        if not is_right:
            raise DataError(
                f"{path}, line {number}: must be a figure, an item's place from 0 (ascending for "
                "each figure) and a finite value; measure the run again"
            )
        values[place] = value
    outcomes = {}
    for figure, values in found.items():
        outcomes[figure] = np.array(list(values.values()), dtype=np.float64)
    return outcomes
