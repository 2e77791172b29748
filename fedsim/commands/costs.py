"""The paper's elapsed times beside measured rows and their projection: ``fedsim costs [RUN …] [--page]``.

Only arithmetic: nothing is run. ``--rows`` is a folder of a machine's benchmark rows; in a clone it
may be left out, or be one of tools/bench/results by name (by default a GPU's, if there is one).
``--target`` is a machine to project to, such as 4xH200 (may be repeated). RUN directories add the
seconds of their phases. ``--json FILE`` writes all figures, ``--page`` docs/results/costs.md.
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

WORK = Path(__file__).parents[1] / "study" / "paper_work.json"
"""Effort of the paper's pieces of work, written by tools/bench/paper_work.py."""

TARGETS = ("4xA100-SXM4-80GB", "4xH200")
# Piece → stage, beginnings of the row's name (the best first), and the entry of the row's shapes
# that counts the units of a call ("": a call is one unit).
PIECES: dict[str, tuple[str, Sequence[str], str]] = {
    "local_step": ("local_step", (f"{FAST}, dropout 0.05", FAST), ""),
    "cai_iteration": ("cai_iteration", (FAST,), ""),
    "guard_row": ("guard", ("",), "rows"),
    "conversation": (
        "generation",
        ("CAI's three turns, 128 slots", "CAI's three turns, 64 slots"),
        "rows",
    ),
    "aggregation": ("aggregation", ("fast sum and FedAvg's step",), ""),
    "correction": ("aggregation", ("SCAFFOLD's correction",), ""),
}


def paper_work() -> dict[str, Effort]:
    """Effort of one unit of each piece of the paper's work, by name."""
    content = json.loads(WORK.read_text(encoding="utf-8"))
    return {name: Effort(**effort) for name, effort in content.items()}


def committed(results: Path | None) -> dict[str, dict[str, StageResult]]:
    """Stages by folder name, GPUs first.

    Args:
        results: folder of the folders; None = there is none.
    """
    if results is None:
        return {}
    found = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        stages = _stages(folder)
        if stages:
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
            raise ConfigError(
                f"{file}: holds no rows of the benchmark ({error!r}); give another folder",
            ) from error
    return found


def chosen(name: str | None, known: Mapping[str, dict[str, StageResult]]) -> dict[str, StageResult]:
    """The rows of one machine.

    Args:
        name: a key of ``known``, or the path of a folder; None = the first that is known.
        known: stages by folder name.

    Raises:
        ConfigError: there are none.
    """
    # By default the preferred machine.
    if name is None and known:
        return known[next(iter(known))]

    # A committed machine by name, or a folder by path.
    if name is not None:
        stages = known.get(name) or _stages(Path(name))
        if stages:
            return stages

    what = "not given, and this fedsim has no committed rows"
    if name is not None:
        what = f"{name}: no rows of a machine"
    others = f"; known: {', '.join(known)}" if known else ""
    raise ConfigError(
        f"--rows {what}; give a folder that tools/bench/run.py of a clone has written{others}",
    )


def read(stages: Mapping[str, StageResult]) -> Measured:
    """The pieces of a machine's rows, with machine, date and commit."""
    # Seconds of one unit of each piece that was timed.
    pieces = {}
    for piece, (stage, names, unit) in PIECES.items():
        if stage not in stages:
            continue
        row = _row(stages[stage].rows, names)
        if row is None or row.seconds is None or row.fraction_of_floor is None:
            continue
        num_units = row.shapes[unit] if unit else 1
        pieces[piece] = Piece(row.seconds.p50 / num_units, row.fraction_of_floor)

    # A step in a lane of several ranks over one on a single rank.
    lane = None
    if "wide_lane" in stages:
        lane = _figure(stages["wide_lane"].rows, "share_of_16_rows")

    # Machine, model, dates and commits, for the reader.
    facts = next(iter(stages.values())).facts
    all_facts = [result.facts for result in stages.values()]
    commits = ", ".join(sorted({(one["commit"] or "unknown")[:10] for one in all_facts}))
    dates = ", ".join(sorted({one["date"][:10] for one in all_facts}))
    is_gpu = _of_gpu(stages)
    device, place = facts["device"], facts["device"]
    if not is_gpu:
        device, place = "CPU", f"{place}, {facts['threads']} thread(s), no GPU"
    stamp = f"{place}, {facts['model']}, {dates}, commit {commits}"
    projects = is_gpu and facts["model"] == LARGE
    return Measured(device, facts["model"], projects, stamp, pieces, lane)


def _of_gpu(stages: Mapping[str, StageResult]) -> bool:
    return all(result.facts["device"].startswith("NVIDIA") for result in stages.values())


def _row(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """The first row whose name begins with the first of ``names`` that any row has."""
    for name in names:
        for row in rows:
            if row.name.startswith(name):
                return row
    return None


def _figure(rows: Sequence[Row], name: str) -> float | None:
    """A figure of the first row that has it."""
    for row in rows:
        if name in row.figures:
            return row.figures[name]
    return None


def run_rows(folders: Sequence[Path]) -> dict[str, list[MetricRow]]:
    """Metric rows of run directories, by the shortest distinct end of their path.

    Raises:
        ConfigError: one is no run directory, or is named twice.
    """
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ConfigError(
                f"{folder}: has no metrics.jsonl; give the directory of a run, such as runs/demo",
            )
    names = short_names(folders)
    found = {}
    for name, folder in zip(names, folders, strict=True):
        found[name] = MetricLog(folder / "metrics.jsonl").rows()
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="fedsim costs", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="directories of finished runs",
    )
    parser.add_argument(
        "--rows",
        help="folder of rows: a path, or a name in a clone's tools/bench/results",
    )
    parser.add_argument(
        "--target",
        action="append",
        help=f"a machine to project to; {' and '.join(TARGETS)}",
    )
    parser.add_argument("--json", type=Path, help="write the figures as JSON to this file")
    parser.add_argument(PAGE, action="store_true", help="write docs/results/costs.md")
    return parser.parse_args(arguments)


def work(asked: argparse.Namespace) -> None:
    """Compute, print and write."""
    runs, efforts = run_rows(asked.runs), paper_work()
    found = projected_report(efforts, asked.rows, asked.target)
    seconds = run_table(runs)

    # On the terminal.
    parts = [found.table().plain(), "", found.caption, "", *found.formulas(efforts)]
    if runs:
        parts += ["", seconds.plain()]
    print("\n".join(parts))

    # All figures as JSON, and the result page.
    if asked.json is not None:
        units = {name: asdict(effort) for name, effort in efforts.items()}
        content = {"work": units, **asdict(found), "runs": []}
        if runs:
            content["runs"] = [seconds.head, *seconds.rows]
        _write(asked.json, json.dumps(content) + "\n")
    if asked.page:
        _write(results_folder(PAGE) / "costs.md", page(found, efforts, seconds if runs else None))


def projected_report(
    work: Mapping[str, Effort],
    rows: str | None = None,
    targets: Sequence[str] | None = None,
) -> Report:
    """The costs by the committed rows.

    Args:
        rows: folder of the rows, by name or path; by default the one that is preferred.
        targets: machines to project to, by name.
    """
    root = repository()
    known = committed(None if root is None else root / "tools" / "bench" / "results")
    why = "no GPU row is committed"
    if any(map(_of_gpu, known.values())):
        why = "these rows are of a CPU"
    machines = [machine(text) for text in targets or TARGETS]
    return report(read(chosen(rows, known)), work, machines, why)


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
    if runs:
        parts.append(runs.markdown())
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); give another path",
        ) from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return launched(lambda: parse(argv), work)
