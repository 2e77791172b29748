"""Rows of a run, split by use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally


@dataclass(frozen=True)
class PreparedData:
    """All rows that a run uses.

    Attributes:
        source: path of the SQuARe file.
        source_sha256: its hash.
        shards: rows of each client.
        guard_rows: for guard fine-tuning, without rows that have no reply to classify.
        cai_rows: rows with the questions that CAI starts from.
        notes: remarks for the user on the file and the splits, one line each.
        guard_tally: counts of the guard set before its rows without a reply were dropped.
        attacked: SHA-256 of the rows that attackers have changed; "" where there are none.
    """

    source: Path
    source_sha256: str
    shards: list[list[SquareRow]]
    guard_rows: list[SquareRow]
    cai_rows: list[SquareRow]
    notes: list[str]
    guard_tally: Tally = field(default_factory=Tally)
    attacked: str = ""
