"""Figures of the finished runs of a study, per seed and item, from their run directories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedsim.base.errors import DataError
from fedsim.base.figures import Benchmarks, read_benchmarks
from fedsim.config import Config, file_roles, load_config, model_roles, to_flat
from fedsim.evaluate.own import DESCRIBED, OWN
from fedsim.record.groups import Settings, differing, settings_of, shown_value
from fedsim.record.manifest import read_manifest
from fedsim.record.metrics import Row, read_rows
from fedsim.record.outcomes import item_file, read_items
from fedsim.record.timers import top_level_seconds
from fedsim.report.summary import eval_points

FINAL: Final = ("after_cai", "global")
"""Points of the model that a run ends with."""

MEASURED: Final = tuple(OWN)
"""Roles of the files, in a manifest, that all runs of a study are measured on."""


class Outcome:
    """One finished run.

    Args:
        folder: its run directory.

    Raises:
        DataError: the folder is no finished run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "summary.md").is_file() or not (folder / "metrics.jsonl").is_file():
            raise DataError(f"{folder}: is no finished run (summary.md and metrics.jsonl are missing); run it first")
        self.config: Config = load_config(folder / "config.yaml")
        self.rows: list[Row] = read_rows(folder / "metrics.jsonl")
        self.points = eval_points(self.rows)
        self._items: dict[str, dict[str, np.ndarray]] = {}

    @cached_property
    def settings(self) -> Settings:
        """The settings that decide the run's figures, without the seed."""
        return settings_of(to_flat(self.config), self.manifest)

    @cached_property
    def benchmarks(self) -> Benchmarks:
        """What the run can have measured."""
        return read_benchmarks(self.folder) or DESCRIBED

    @property
    def final(self) -> str:
        """Point of the model that the run ended with.

        Raises:
            DataError: it was not evaluated.
        """
        found = [point for point in FINAL if point in self.points]
        if not found:
            raise DataError(f"{self.folder}: was not evaluated after its last round; run it again with a benchmark")
        return found[0]

    def figure(self, point: str, name: str) -> float | None:
        """``eval/<name>`` as the run recorded it; None if it has none."""
        value = self.points.get(point, {}).get(f"eval/{name}")
        return None if value is None else float(value)

    def items(self, point: str, name: str) -> np.ndarray | None:
        """Outcome of every item, fp64 ``[num_items]``; None if the figure is not kept by item.

        Raises:
            DataError: the file is damaged, or its items are not those behind the figure that the run recorded.
        """
        path = item_file(self.folder, int(self.points[point]["round"]), point)
        if point not in self._items:
            self._items[point] = read_items(path) if path.is_file() else {}
        values, recorded = self._items[point].get(name), self.figure(point, name)
        if values is not None and recorded is not None:
            mean = float(values.mean())
            if not any(math.isclose(mean, recorded / unit, rel_tol=1e-9, abs_tol=1e-12) for unit in (1, 100)):
                raise DataError(f"{path}: its items of {name} do not give the figure in metrics.jsonl; run it again")
        return values

    @property
    def total_s(self) -> float:
        """Seconds of the run's phases, over all sessions."""
        return sum(sum(top_level_seconds(row).values()) for row in self.rows)

    def phase_s(self, phase: str) -> float:
        """Seconds of one phase, such as ``cai`` or ``train``, over all rounds."""
        return sum(float(row.get(f"time/{phase}_s", 0.0)) for row in self.rows)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What the run's figures depend on."""
        return read_manifest(self.folder / "manifest.json")


def check_paired(arms: Sequence[Sequence[Outcome]]) -> None:
    """Refuse arms that do not pair: other seeds, unlike runs in an arm, or files that changed between the runs.

    Raises:
        DataError: they cannot be compared item by item; the message names the runs.
    """
    first, files = arms[0], dict[str, tuple[str, Path]]()
    for outcomes in arms:
        check_alike(outcomes)
        seeds, expected = ([outcome.config.seed for outcome in arm] for arm in (outcomes, first))
        if seeds != expected:
            raise DataError(
                f"{outcomes[0].folder}: its arm has the seeds {seeds}, that of {first[0].folder} has {expected}; run "
                "all arms with the same seeds"
            )
        for outcome in outcomes:
            _check_files(outcome, files)


def check_alike(outcomes: Sequence[Outcome]) -> None:
    """Refuse to put runs together that differ in more than seed and place, or have a seed twice.

    Raises:
        DataError: names two runs and the keys in which they differ.
    """
    first, by_seed = outcomes[0], dict[int, Path]()
    for outcome in outcomes:
        seed = outcome.config.seed
        if seed in by_seed:
            raise DataError(f"{outcome.folder} and {by_seed[seed]}: both have seed {seed}; take one of them")
        by_seed[seed] = outcome.folder
        both = [first.settings, outcome.settings]
        if keys := differing(both):
            words = []
            for key in keys[:5]:
                words.append(f"{key}: {shown_value(key, both[0], both)} and {shown_value(key, both[1], both)}")
            raise DataError(
                f"{first.folder} and {outcome.folder}: are no seeds of one arm, as they differ in "
                f"{'; '.join(words)}; remove the one that is not meant, and start the command again"
            )


def _check_files(outcome: Outcome, known: dict[str, tuple[str, Path]]) -> None:
    """Compare a run's files with those of the runs before it, by role and by the path that the configuration has.

    Args:
        known: key and path → SHA-256 and the run that has it; this run's are added.
    """
    config = to_flat(outcome.config)
    for key, role in {**file_roles(), **model_roles()}.items():
        content = outcome.settings[key]
        # An embedded corpus has the size that the splits ask for, which a sweep may vary.
        if content is None or (content.embedded and role not in MEASURED):
            continue
        place = role if role in MEASURED else f"{role} {config[key]}"
        digest, other = known.setdefault(place, (content.sha256, outcome.folder))
        if digest != content.sha256:
            raise DataError(
                f"{outcome.folder}: had another {role} file than {other}; remove one of the two runs and start the "
                "command again"
            )


def sample(outcomes: Sequence[Outcome], point: str, name: str, scale: float = 1.0) -> np.ndarray | None:
    """One arm's outcomes over its seeds, fp64 ``[num_seeds, num_items]``, times ``scale``.

    A figure that no item file holds, such as a judge's score, counts as one item: its seeds alone are draws then.

    Args:
        outcomes: runs of one arm, in the order of their seeds.
        point: as in the metric rows; ``final`` stands for the model that the run ended with.

    Returns:
        None if some run lacks the figure.

    Raises:
        DataError: the runs were measured on different numbers of items.
    """
    columns = []
    for outcome in outcomes:
        at = outcome.final if point == "final" else point
        values = outcome.items(at, name)
        if values is None:
            single = outcome.figure(at, name)
            if single is None:
                return None
            values = np.array([single / scale])
        columns.append(values)
    if len({len(column) for column in columns}) > 1:
        raise DataError(
            f"{outcomes[0].folder.parent}: the runs of an arm have {sorted({len(c) for c in columns})} items of "
            f"{name}; run all seeds on the same benchmark files"
        )
    return scale * np.stack(columns)
