"""Reader of a finished run's directory: configuration, manifest, metric rows and items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from fedsim.base.errors import CheckpointError, DataError
from fedsim.base.figures import Benchmarks, read_benchmarks
from fedsim.config import Config, load_config, to_flat
from fedsim.evaluate.own import DESCRIBED
from fedsim.record.groups import Settings, settings_of
from fedsim.record.manifest import read_manifest
from fedsim.record.metrics import Row, read_rows
from fedsim.record.outcomes import item_file, read_items
from fedsim.record.timers import total_seconds
from fedsim.report.summary import RunFacts, eval_points, facts_from

FILES: Final = ("config.yaml", "metrics.jsonl", "manifest.json")
"""Files that every run directory holds; ``summary.md`` is the last that a run writes."""

FINAL: Final = ("after_cai", "global")
"""Evaluation points of the model that a run ends with."""


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: its run directory.
        config: its configuration.
        rows: its metric rows, oldest first.
        manifest: its ``manifest.json``.
        benchmarks: benchmarks that it can have measured.
        notes: lines under ``## Notes`` of its summary.
    """

    folder: Path
    config: Config
    rows: Sequence[Row]
    manifest: Mapping[str, Any]
    benchmarks: Benchmarks
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run directory; items are read when they are first asked for.

        Raises:
            DataError: the folder is no run's, or the run is not finished.
            CheckpointError: a file of it is damaged.
            ConfigError: its configuration is not valid.
        """
        # The folder is a run's, and the run is finished.
        for name in FILES:
            if not (folder / name).is_file():
                raise DataError(
                    f"{folder}: is no finished run, as it holds no {name}; give the directory of a "
                    "finished run (record.dir/name)"
                )
        config = load_config(folder / "config.yaml")
        # A finished run's last line is its last round's: a line cut short shows as a missing round.
        rows = read_rows(folder / "metrics.jsonl", allow_torn_end=True)
        num_done = len({row["round"] for row in rows if row["stage"] == "round"})
        planned, summary = config.federation.num_rounds, folder / "summary.md"
        if num_done < planned or not summary.is_file():
            done = f"{num_done} of {planned} rounds"
            raise DataError(f"{folder}: is not finished ({done}); start its command again to go on")
        # The manifest, with the parts that a finished run is read for.
        manifest = read_manifest(folder / "manifest.json")
        if not isinstance(manifest.get("started"), dict) or "num_ranks" not in manifest["started"]:
            path = folder / "manifest.json"
            raise CheckpointError(f"{path}: is damaged (it has no started.num_ranks); restore it")
        # Without benchmarks.json, which older runs lack, they are fedsim's own.
        benchmarks = read_benchmarks(folder) or DESCRIBED
        notes = summary_notes(summary.read_text(encoding="utf-8"))
        return cls(folder, config, rows, manifest, benchmarks, notes)

    @cached_property
    def settings(self) -> Settings:
        """Settings that decide the run's figures, without the seed."""
        return settings_of(to_flat(self.config), self.manifest)

    @cached_property
    def facts(self) -> RunFacts:
        """Facts that a summary states about the run; places and plots are left out."""
        return facts_from(
            to_flat(self.config),
            num_ranks=self.manifest["started"]["num_ranks"],
            total_s=self.total_s,
            places={},
            notes=self.notes,
            manifest=self.manifest,
            benchmarks=self.benchmarks,
        )

    @cached_property
    def points(self) -> dict[str, Row]:
        """Metric row of each evaluation point (:func:`fedsim.report.summary.eval_points`)."""
        return eval_points(self.rows)

    @property
    def final(self) -> Row | None:
        """Last evaluation of the model that the run ended with; None without one."""
        for point in FINAL:
            if point in self.points:
                return self.points[point]
        return None

    @property
    def final_point(self) -> str:
        """Evaluation point of :attr:`final`.

        Raises:
            DataError: that model was not evaluated.
        """
        if self.final is None:
            fix = "run it again with a benchmark"
            raise DataError(f"{self.folder}: was not evaluated after its last round; {fix}")
        return str(self.final["point"])

    @property
    def evaluations(self) -> list[Row]:
        """Round, point and figures of every evaluation; equal for two runs of equal results."""
        found = []
        for row in self.rows:
            if row["stage"] == "eval":
                names = [n for n in row if n in ("round", "point") or n.startswith("eval/")]
                found.append({name: row[name] for name in names})
        return found

    @property
    def total_s(self) -> float:
        """Seconds of the run's phases, over all sessions."""
        return total_seconds(self.rows)

    def phase_s(self, phase: str) -> float:
        """Seconds of one phase, such as ``cai`` or ``train``, over all rounds."""
        return sum(float(row.get(f"time/{phase}_s", 0.0)) for row in self.rows)

    def figure(self, point: str, name: str) -> float | None:
        """``eval/<name>`` as the run recorded it; None if it has none."""
        value = self.points.get(point, {}).get(f"eval/{name}")
        return None if value is None else float(value)

    def items(self, point: str, name: str) -> np.ndarray | None:
        """Outcome of every item, fp64 ``[num_items]``; None if the figure is not kept by item.

        Raises:
            DataError: the file is damaged, or its items are not those behind the recorded figure.
        """
        path = item_file(self.folder, int(self.points[point]["round"]), point)
        if point not in self._items:
            self._items[point] = read_items(path) if path.is_file() else {}
        values, recorded = self._items[point].get(name), self.figure(point, name)
        if values is not None and recorded is not None:
            mean = float(values.mean())
            # A recorded share is in percent, its items are 0 to 1; other figures have one unit.
            expected = (recorded, recorded / 100)
            if not any(math.isclose(mean, e, rel_tol=1e-9, abs_tol=1e-12) for e in expected):
                reason = f"its items of {name} do not give the figure in metrics.jsonl"
                raise DataError(f"{path}: {reason}; run it again")
        return values

    @cached_property
    def _items(self) -> dict[str, dict[str, np.ndarray]]:
        """Outcomes by point and figure of the item files that were read."""
        return {}


def summary_notes(summary: str) -> list[str]:
    """Return the lines under a summary's ``## Notes``."""
    _, _, after = f"\n{summary}".partition("\n## Notes\n")
    notes = after.partition("\n## ")[0]
    return [line.removeprefix("- ") for line in notes.splitlines() if line.startswith("- ")]
