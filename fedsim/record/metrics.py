"""The run's metric rows: one JSON object a line in ``metrics.jsonl``, written at once and cut back on a resume.

A row is ``{"round": int, "stage": "train" | "eval" | ..., "stage/name": number, ...}``. Floats are written so that
they read back bit for bit. Keys that measure the machine rather than the model (``time/``, ``perf/``, ``parallel/``)
are left out by :func:`decided`; the rest may not depend on the number of ranks, and is what two runs are compared by.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.base.errors import CheckpointError
from fedsim.base.json_text import NotJsonError, parse_json
from fedsim.base.rounds import round_number

Row = dict[str, Any]

#: Stage of the row that holds the time and traffic of a resumed session's preparation; its round is the checkpoint's.
RESUME = "resume"

CLOCK_PREFIXES = ("time/", "perf/", "parallel/")


class MetricLog:
    """Appends rows to one file; every row is on disk when :meth:`append` returns.

    Only rank 0 may hold one. ``round`` is the round's number, from 1; rows about the pretrained model carry 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, round_idx: int, stage: str, metrics: Mapping[str, float | int | str | bool | None]) -> Row:
        """Write one row and return it.

        Values are plain numbers, texts, booleans or None ("not measured"). NaN and infinity are written as Python's
        JSON reader takes them (``NaN``, ``Infinity``).
        """
        row: Row = {"round": round_number(int(round_idx)), "stage": stage}
        for name, value in metrics.items():
            assert name not in row, f"metric {name!r} would overwrite the row's own field"
            row[name] = _plain(name, value)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row

    def rows(self) -> list[Row]:
        """Every row so far, oldest first; none if the file does not exist yet."""
        return read_rows(self.path) if self.path.exists() else []

    def truncate_after(self, round_idx: int | None) -> int:
        """Drop the rows of all rounds after ``round_idx``, and a last line that a crash cut short.

        A run that resumes from the checkpoint of ``round_idx`` calls this first; None, no checkpoint, drops every row.
        The file is replaced atomically.

        Returns:
            How many whole rows were dropped.
        """
        if not self.path.exists():
            return 0
        rows = read_rows(self.path, allow_torn_end=True)
        kept = [] if round_idx is None else [row for row in rows if row["round"] <= round_number(round_idx)]
        new = self.path.with_suffix(".jsonl.new")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        return len(rows) - len(kept)


def read_rows(path: Path, allow_torn_end: bool = False) -> list[Row]:
    """Read a ``metrics.jsonl``.

    Args:
        allow_torn_end: leave out a last line that has no line end (a crash while it was written).

    Raises:
        CheckpointError: it cannot be read, or a line is not a JSON object with ``round``, ``stage`` and plain values.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    torn = lines.pop()  # a crash may have cut it within a character
    if torn and not allow_torn_end:
        lines.append(torn)
    return _parsed(path, lines, first=1)


class NewRows:
    """The rows that a file has gained since the last look, for whoever follows a run: memory and time per look do not
    grow with the file.

    Args:
        path: a ``metrics.jsonl``, which need not exist yet and is only appended to meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        self._count = 0

    def read(self) -> list[Row]:
        """Whole new rows, oldest first; a line that is just being written comes with the next look.

        Raises:
            CheckpointError: as :func:`read_rows`.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._place)
            whole, end, _ = file.read().rpartition(b"\n")
        if not end:
            return []
        rows = _parsed(self.path, whole.split(b"\n"), first=self._count + 1)
        self._place += len(whole) + len(end)
        self._count += len(rows)
        return rows


def _parsed(path: Path, lines: Iterable[bytes], first: int) -> list[Row]:
    """Lines as rows; ``first`` is the first one's number in the file."""
    rows: list[Row] = []
    for number, line in enumerate(lines, start=first):
        try:
            row = parse_json(line.decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}, line {number}: is not UTF-8; remove the line") from error
        except NotJsonError as error:
            raise CheckpointError(f"{path}, line {number}: is not JSON ({error.reason}); remove the line") from error
        if not isinstance(row, dict) or type(row.get("round")) is not int or not isinstance(row.get("stage"), str):
            raise CheckpointError(f"{path}, line {number}: must be an object with a whole number 'round' and a 'stage'")
        if row["round"] < 0:
            raise CheckpointError(
                f"{path}, line {number}: has round {row['round']}, but rounds are counted from 1 (0 is the pretrained "
                "model's); an earlier fedsim, which counted from 0, wrote this run: read it with that one (its commit "
                "is in manifest.json), or run it again under another name (name=...)"
            )
        if not all(value is None or isinstance(value, bool | int | float | str) for value in row.values()):
            raise CheckpointError(f"{path}, line {number}: must hold plain values alone; remove the line")
        rows.append(row)
    return rows


def decided(row: Mapping[str, Any]) -> Row:
    """The row without its clock-dependent keys (:data:`CLOCK_PREFIXES`)."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCK_PREFIXES)}


def decided_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """:func:`decided` of all rows but those of stage :data:`RESUME`: what a run and one that was resumed agree in."""
    return [decided(row) for row in rows if row["stage"] != RESUME]


def _plain(name: str, value: Any) -> float | int | str | bool | None:
    """``value`` as a plain Python number; NumPy scalars and one-element tensors are unpacked."""
    if hasattr(value, "item"):
        value = value.item()
    assert value is None or isinstance(value, bool | int | float | str), f"metric {name!r} is a {type(value).__name__}"
    return value
