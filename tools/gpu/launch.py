"""Starts a run as launch/run.py does, on a machine that lacks what neither training nor figures need.

Without the datasets library the rows of the SQuARe file are kept as JSON, without matplotlib no picture is drawn.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

from tools.gpu import without  # noqa: E402

without.hide_as_told()  # before anything else is imported

from fedsim.data import square  # noqa: E402
from fedsim.report import finish  # noqa: E402
from launch.run import main  # noqa: E402
from tools.bench.stage import installed  # noqa: E402


class JsonRows(square.ArrowRows):
    """Rows by position, read whole."""

    def __init__(self, path: Path) -> None:
        self._rows = json.loads(path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, positions: list[int]) -> list[square.SquareRow]:
        """Rows at these positions, in this order."""
        entries: list[dict[str, Any]] = [self._rows[position] for position in positions]
        return [square.SquareRow(**{**entry, "categories": tuple(entry["categories"])}) for entry in entries]


def write_json(rows: list[square.SquareRow], path: Path) -> None:
    """What :class:`JsonRows` reads."""
    path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def stand_ins() -> list[str]:
    """Put stand-ins where libraries are missing; what was replaced, in words."""
    said = []
    if not installed("datasets"):
        square.to_arrow, square.from_arrow = write_json, JsonRows
        said.append("datasets is not installed: rows kept as JSON")
    if not installed("matplotlib"):
        finish.write_plots = lambda *_: []
        said.append("matplotlib is not installed: no pictures")
    return said


if __name__ == "__main__":
    stand_ins()
    sys.exit(main())
