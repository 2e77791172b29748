"""A sweep's file: the configuration keys that it varies, in two forms, and the findings it reports.

::

    what: how many CAI iterations, and how often?     # one line
    config: ../table1.yaml                            # relative to this file
    x: cai.iterations                                 # horizontal axis of the plot: a key, or a
    figure of the run curves: cai.every                                 # one curve for each value
    of this key; may be left out figures: [advbench_harmless, mt_bench]            # what is
    plotted, by name in the item files about: every is 1 in every round                  # a
    paragraph for the result page; may be left out quick:
      seeds: 0-2
      settings: {federation.num_rounds: 8}            # for all cells of this form
      grids:                                          # each is the product of its lists
        - {cai.every: [1, 5], cai.iterations: [5, 25]}
      findings:                                       # two differences: treated − control, each one
      cell
        - {figure: mt_bench, treated: {cai.every: 1, cai.iterations: 25}, control: {cai.every: 5,
          cai.iterations: 25}}
    full: ...
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsim.base.errors import ConfigError
from fedsim.study.runs import Cell

FORMS = ("quick", "full")


@dataclass(frozen=True)
class Comparison:
    """A difference that a sweep reports: ``treated`` minus ``control`` in one figure."""

    figure: str
    treated: Mapping[str, Any]
    control: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """One form of a sweep.

    Attributes:
        name: of the file; the study's name.
        what: the question, in one line.
        config: configuration file that the cells build on.
        x: key or figure on the horizontal axis.
        curves: key that makes a curve of each of its values; "" makes one curve.
        figures: names of what is plotted.
        about: paragraph for the result page, "" for none.
        seeds: as :func:`fedsim.study.command.parse_seeds` reads them.
        settings: for all cells, before the user's own.
        points: what each cell sets, in order.
        findings: the differences to report.
    """

    name: str
    what: str
    config: Path
    x: str
    curves: str
    figures: tuple[str, ...]
    about: str
    seeds: str
    settings: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]
    findings: tuple[Comparison, ...]

    def cells(self, seeds: Sequence[int]) -> list[Cell]:
        """Every point with every seed, in the file's order, the seeds of a point together."""
        found = []
        for point in self.points:
            name = point_name(point)
            labels = {key: str(value) for key, value in point.items()}
            for seed in seeds:
                found.append(Cell(f"{name}-s{seed}", seed, labels, point))
        return found


def point_name(point: Mapping[str, Any]) -> str:
    """Folder name of a point, such as ``every-1-iterations-25``."""
    parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", "-".join(parts))


def read_sweep(path: Path, form: str) -> Sweep:
    """Read one form of a sweep's file.

    Raises:
        ConfigError: the file cannot be read, lacks a part, or names a point in ``findings`` that no
            grid has.
    """
    # The file, and its part for the form.
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"sweep {path}: cannot be read ({why}); give a YAML file") from error
    if not isinstance(content, dict) or not isinstance(content.get(form), dict):
        raise ConfigError(
            f"sweep {path}: must be a mapping with a part {form!r}; see configs/sweeps for examples",
        )
    chosen = content[form]

    # Entries; a missing one and one of another shape have messages of their own.
    try:
        points = tuple(_points(chosen["grids"]))
        sweep = Sweep(
            name=path.stem,
            what=str(content["what"]),
            config=path.parent / content["config"],
            x=str(content["x"]),
            curves=str(content.get("curves", "")),
            figures=tuple(content["figures"]),
            about=str(content.get("about", "")).strip(),
            seeds=str(chosen["seeds"]),
            settings=dict(chosen.get("settings", {})),
            points=points,
            findings=tuple(_finding(**finding) for finding in chosen.get("findings", ())),
        )
    except KeyError as error:
        raise ConfigError(
            f"sweep {path}, form {form}: lacks {error.args[0]!r}; see configs/sweeps for examples",
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"sweep {path}, form {form}: has another shape than configs/sweeps ({error})",
        ) from error
    _check(path, sweep)
    return sweep


def _finding(figure: str, treated: Mapping[str, Any], control: Mapping[str, Any]) -> Comparison:
    return Comparison(figure, dict(treated), dict(control))


def _points(grids: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The products of all grids, each point once."""
    points: list[dict[str, Any]] = []
    for grid in grids:
        if not grid or not all(isinstance(key, str) for key in grid) or [] in grid.values():
            raise ValueError(
                f"grid {dict(grid)}: needs keys, each with a value or a list of values",
            )
        values = []
        for value in grid.values():
            values.append(value if isinstance(value, list) else [value])
        for chosen in itertools.product(*values):
            point = dict(zip(grid, chosen, strict=True))
            if point not in points:
                points.append(point)
    return points


def _check(path: Path, sweep: Sweep) -> None:
    if not sweep.points:
        raise ConfigError(
            f"sweep {path}: its grids are empty; give at least one key with a list of values",
        )
    # Names of points are folders, so that no two may be alike.
    names = [point_name(point) for point in sweep.points]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"sweep {path}: two points share the name {double}; keys of one grid need different last words",
        )

    # Findings name points of the grids.
    points = [dict(point) for point in sweep.points]
    for finding in sweep.findings:
        for point in (finding.treated, finding.control):
            if dict(point) not in points:
                raise ConfigError(
                    f"sweep {path}: a finding names the point {dict(point)}, which no grid has; mend either",
                )
