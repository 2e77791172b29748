"""The paper's elapsed times beside measured rows and their projection: ``fedsim costs [RUN …] [--page]``.

Arithmetic alone: nothing is run. ``--rows`` is a folder of a machine's benchmark rows; in a clone it may be left out,
or be one of tools/bench/results by name (by default a GPU's, if there is one). ``--target`` is a machine to project to,
such as 4xH200 (may be repeated). RUN directories add the seconds of their phases. ``--json FILE`` writes all figures,
``--page`` docs/results/costs.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.base.version import repository
from fedsim.record.groups import short_names
from fedsim.record.metrics import MetricLog
from fedsim.record.metrics import Row as MetricRow
from fedsim.study.bench_rows import FAST, LARGE, Row, StageResult
from fedsim.study.command import PAGE, results_folder
from fedsim.study.costs import Effort, Measured, Piece, Report, machine, report, run_table

WORK = Path(__file__).parents[1] / "study" / "paper_work.json"  # written by tools/bench/paper_work.py
TARGETS = ("4xA100-SXM4-80GB", "4xH200")
# Stage and beginning of the row's name, the best first, and the entry of its shapes that a unit is one of.
PIECES: dict[str, tuple[str, Sequence[str], str]] = {
    "local_step": ("local_step", (f"{FAST}, dropout 0.05", FAST), ""),
    "cai_iteration": ("cai_iteration", (FAST,), ""),
    "guard_row": ("guard", ("",), "rows"),
    "conversation": ("generation", ("CAI's three turns, 128 slots", "CAI's three turns, 64 slots"), "rows"),
    "aggregation": ("aggregation", ("fast sum and FedAvg's step",), ""),
    "correction": ("aggregation", ("SCAFFOLD's correction",), ""),
}


def paper_work() -> dict[str, Effort]:
    """Effort of one unit of each piece of the paper's work, by name."""
    return {name: Effort(**effort) for name, effort in json.loads(WORK.read_text(encoding="utf-8")).items()}


def committed(results: Path | None) -> dict[str, dict[str, StageResult]]:
    """Stages by folder name, GPUs first.

    Args:
        results: folder of the folders; None = there is none.
    """
    if results is None:
        return {}
    found = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        if stages := _stages(folder):
            found[folder.name] = stages
    return dict(sorted(found.items(), key=lambda entry: not _of_gpu(entry[1])))


def _stages(folder: Path) -> dict[str, StageResult]:
    """Stages of one machine, by name.

    Raises:
        ConfigError: a file there is none of the benchmark's.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found[file.stem] = StageResult.read(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: holds no rows of the benchmark ({error!r}); give another folder") from error
    return found


def chosen(name: str | None, known: Mapping[str, dict[str, StageResult]]) -> dict[str, StageResult]:
    """The rows of one machine.

    Args:
        name: a key of ``known``, or the path of a folder; None = the first that is known.
        known: stages by folder name.

    Raises:
        ConfigError: there are none.
    """
    if name is not None and name not in known and (stages := _stages(Path(name))):
        return stages
    key = next(iter(known), "") if name is None else name
    if key not in known:
        what = "not given, and this fedsim has no committed rows" if name is None else f"{name}: no rows of a machine"
        there = f"; known: {', '.join(known)}" if known else ""
        raise ConfigError(f"--rows {what}; give a folder that tools/bench/run.py of a clone has written{there}")
    return known[key]


def read(stages: Mapping[str, StageResult]) -> Measured:
    """The pieces of a machine's rows, and where they are from."""
    facts = next(iter(stages.values())).facts
    pieces = {}
    for piece, (stage, names, unit) in PIECES.items():
        row = _row(stages[stage].rows, names) if stage in stages else None
        if row is not None and row.seconds is not None and row.fraction_of_floor is not None:
            pieces[piece] = Piece(row.seconds.p50 / (row.shapes[unit] if unit else 1), row.fraction_of_floor)
    lane = _figure(stages["wide_lane"].rows, "share_of_16_rows") if "wide_lane" in stages else None
    commits = ", ".join(sorted({(result.facts["commit"] or "unknown")[:10] for result in stages.values()}))
    dates = ", ".join(sorted({result.facts["date"][:10] for result in stages.values()}))
    gpu = _of_gpu(stages)
    place = facts["device"] if gpu else f"{facts['device']}, {facts['threads']} thread(s), no GPU"
    stamp = f"{place}, {facts['model']}, {dates}, commit {commits}"
    return Measured(
        facts["device"] if gpu else "CPU", facts["model"], gpu and facts["model"] == LARGE, stamp, pieces, lane
    )


def _of_gpu(stages: Mapping[str, StageResult]) -> bool:
    return all(result.facts["device"].startswith("NVIDIA") for result in stages.values())


def _row(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """The first row that begins with the first of ``names`` that there is."""
    return next((row for name in names for row in rows if row.name.startswith(name)), None)


def _figure(rows: Sequence[Row], name: str) -> float | None:
    return next((row.figures[name] for row in rows if name in row.figures), None)


def run_rows(folders: Sequence[Path]) -> dict[str, list[MetricRow]]:
    """Metric rows of run directories, by as much of their path as tells them apart.

    Raises:
        ConfigError: one is no run directory, or is named twice.
    """
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ConfigError(f"{folder}: has no metrics.jsonl; give the directory of a run, such as runs/demo")
    names = short_names(folders)
    return {name: MetricLog(folder / "metrics.jsonl").rows() for name, folder in zip(names, folders, strict=True)}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="fedsim costs", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directories of finished runs")
    parser.add_argument("--rows", help="folder of rows: a path, or a name in a clone's tools/bench/results")
    parser.add_argument("--target", action="append", help=f"a machine to project to; {' and '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="write the figures as JSON to this file")
    parser.add_argument(PAGE, action="store_true", help="write docs/results/costs.md")
    return parser.parse_args(arguments)


def work(asked: argparse.Namespace) -> None:
    """Compute, print and write."""
    runs, efforts = run_rows(asked.runs), paper_work()
    found = projected_report(efforts, asked.rows, asked.target)
    seconds = run_table(runs)
    parts = [found.table().plain(), "", found.caption, "", *found.formulas(efforts)]
    print("\n".join([*parts, *(["", seconds.plain()] if runs else [])]))
    if asked.json is not None:
        content = {"work": {name: asdict(effort) for name, effort in efforts.items()}, **asdict(found)}
        _write(asked.json, json.dumps({**content, "runs": [seconds.head, *seconds.rows] if runs else []}) + "\n")
    if asked.page:
        _write(results_folder(PAGE) / "costs.md", page(found, efforts, seconds if runs else None))


def projected_report(
    work: Mapping[str, Effort], rows: str | None = None, targets: Sequence[str] | None = None
) -> Report:
    """The costs by the committed rows.

    Args:
        rows: folder of the rows, by name or path; by default the one that is preferred.
        targets: machines to project to, by name.
    """
    root = repository()
    known = committed(None if root is None else root / "tools" / "bench" / "results")
    why = "these rows are of a CPU" if any(map(_of_gpu, known.values())) else "no GPU row is committed"
    return report(read(chosen(rows, known)), work, [machine(text) for text in targets or TARGETS], why)


def page(found: Report, work: Mapping[str, Any], runs: Any) -> str:
    """The result page."""
    first, *others = found.formulas(work)
    parts = [
        "# What the paper's runs cost",
        "Written by `fedsim costs --page`; nothing below is typed in.",
        found.table().markdown(),
        found.caption,
        "## Formulas",
        first,
        "\n".join(f"- {line}" for line in others),
    ]
    return "\n\n".join([*parts, *([runs.markdown()] if runs else [])]) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another path") from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse(argv), work)
