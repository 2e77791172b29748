"""Metric rows of a run: one JSON object a line in ``metrics.jsonl``, cut back on a resume.

A row is ``{"round": int, "stage": "round" | "eval" | ..., "section/name": number, ...}``. Floats
are written so that they read back bit for bit. Metrics that measure the machine rather than the
model (``time/``, ``perf/``, ``parallel/``) are left out by :func:`decided`; the rest may not depend
on the number of ranks, and is compared between two runs.
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

Value = float | int | str | bool | None
"""Value of a metric; None = not measured."""

#: Stage of the row that holds the time and traffic of a resumed session's preparation; its round
#: is the checkpoint's.
RESUME = "resume"

CLOCK_PREFIXES = ("time/", "perf/", "parallel/")
"""Beginnings of metrics that measure the machine."""


class MetricLog:
    """File of metric rows; every row is on disk when :meth:`append` returns.

    Only rank 0 may hold one. ``round`` is the round's number, from 1; rows about the pretrained
    model carry 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, round_idx: int, stage: str, metrics: Mapping[str, Value]) -> Row:
        """Write one row and return it.

        Values are plain numbers, texts, booleans or None ("not measured"). NaN and infinity are
        written as Python's JSON reader takes them (``NaN``, ``Infinity``).
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
        """Read every row so far, oldest first; none if the file does not exist yet."""
        if not self.path.exists():
            return []
        return read_rows(self.path)

    def truncate_after(self, round_idx: int | None) -> int:
        """Drop the rows of all rounds after ``round_idx``, and a last line that a crash cut short.

        A run that resumes from the checkpoint of ``round_idx`` calls this first. The file is
        replaced by an atomic rename.

        Args:
            round_idx: index of the last round to keep; None, no checkpoint, drops every row.

        Returns:
            How many whole rows were dropped.
        """
        if not self.path.exists():
            return 0
        rows = read_rows(self.path, allow_torn_end=True)
        kept: list[Row] = []
        if round_idx is not None:
            kept = [row for row in rows if row["round"] <= round_number(round_idx)]
        # The new file is on disk before it replaces the old one.
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
        CheckpointError: it cannot be read, or a line is not a JSON object with ``round``, ``stage``
            and plain values.
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
    """Reader of the rows that a file has gained since the last look, to follow a run.

    Memory and time per look do not grow with the file.

    Args:
        path: a ``metrics.jsonl``, which need not exist yet and is only appended to meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0  # bytes that were read
        self._count = 0  # rows

    def read(self) -> list[Row]:
        """Read the whole new rows, oldest first; a line without an end is left to the next look.

        Raises:
            CheckpointError: as :func:`read_rows`.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._place)
            # The last line may still be written.
            whole, end, _ = file.read().rpartition(b"\n")
        if not end:
            return []
        rows = _parsed(self.path, whole.split(b"\n"), first=self._count + 1)
        self._place += len(whole) + len(end)
        self._count += len(rows)
        return rows


def _parsed(path: Path, lines: Iterable[bytes], first: int) -> list[Row]:
    """Parse and check lines.

    Args:
        path: of the file, for errors.
        first: number of the first line in the file, from 1.
    """
    rows: list[Row] = []
    for number, line in enumerate(lines, start=first):
        place = f"{path}, line {number}"
        try:
            row = parse_json(line.decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{place}: is not UTF-8; remove the line") from error
        except NotJsonError as error:
            reason = f"is not JSON ({error.reason})"
            raise CheckpointError(f"{place}: {reason}; remove the line") from error
        if not _is_row(row):
            rule = "must be an object with a whole number 'round' and a 'stage'"
            raise CheckpointError(f"{place}: {rule}")
        # Earlier versions gave the pretrained model round -1.
        if row["round"] < 0:
            raise CheckpointError(
                f"{place}: has round {row['round']}, but rounds are counted from 1 (0 is the "
                "pretrained model's); an earlier fedsim, which counted from 0, wrote this run: "
                "read it with that one (its commit is in manifest.json), or run it again under "
                "another name (name=...)"
            )
        if not all(isinstance(value, Value) for value in row.values()):
            raise CheckpointError(f"{place}: must hold plain values only; remove the line")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Return True for a dict with a round and a stage."""
    if not isinstance(row, dict):
        return False
    return type(row.get("round")) is int and isinstance(row.get("stage"), str)


def decided(row: Mapping[str, Any]) -> Row:
    """The row without the metrics that measure the machine (:data:`CLOCK_PREFIXES`)."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCK_PREFIXES)}


def decided_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """:func:`decided` of all rows except those of stage :data:`RESUME`.

    A run and one that was resumed have the same.
    """
    return [decided(row) for row in rows if row["stage"] != RESUME]


def _plain(name: str, value: Any) -> Value:
    """Convert to a plain Python value; NumPy scalars and one-element tensors are unpacked."""
    if hasattr(value, "item"):
        value = value.item()
    assert isinstance(value, Value), f"metric {name!r} is a {type(value).__name__}"
    return value
