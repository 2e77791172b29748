"""The guard in ``summary.md``: figures beside the paper's Table 2, thresholds, categories."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsim.base.tables import NOT_MEASURED, Table, measured, number
from fedsim.record.metrics import Row
from fedsim.report import paper

Tables = Mapping[str, Sequence[Mapping[str, str]]]
"""The lines of the run directory's ``guard/*.csv``, by file name without its ending."""

#: Figures of Table 2, then those that the paper does not give.
COLUMNS = {
    "accuracy": "accuracy %",
    "precision": "precision %",
    "recall": "recall %",
    "hmean": "Hmean %",
    "auprc": "AUPRC %",
    "auroc": "AUROC %",
    "fpr": "FPR %",
    "ece": "ECE %",
    "red_share_before": "red % before",
    "red_share_after": "red % after",
}

#: What the filter does to the rows called unsafe, by the metric that counts them.
ACTIONS = {
    "num_dropped": "left out",
    "num_refused": "given a refusal for a response",
    "num_downweighted": "downweighted",
}

#: Figures of the threshold sweep.
SWEEP = {
    "accuracy": "accuracy %",
    "precision": "precision %",
    "recall": "recall %",
    "hmean": "Hmean %",
    "fpr": "FPR %",
    "dropped_share": "dropped %",
    "red_share_after": "red % after",
}

SHOWN = ("0.1", "0.3", "0.5", "0.7", "0.9")
"""Thresholds of the sweep that the summary shows, beside the run's own and the best one.

The file has all.
"""


def read_tables(folder: Path) -> Tables:
    """Read every ``*.csv`` of the run directory's guard folder; none if there is no such folder."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            tables[path.stem] = list(csv.DictReader(stream))
    return tables


def guard(rows: Sequence[Row], kind: str, tables: Tables) -> list[str]:
    """A line for each guard that was measured, the paper's Table 2, thresholds and categories.

    Args:
        kind: ``guard.kind``.
        tables: of :func:`read_tables`.

    Returns:
        Markdown paragraphs; none without a guard's figures.
    """
    # Point, such as "untuned" or "fine-tuned" → the last row of that guard.
    found: dict[str, Row] = {}
    for row in rows:
        if measured(row, "guard/accuracy") is not None:
            found[str(row.get("point", "this run"))] = row
    if not found:
        return []
    lines = []
    for point, row in found.items():
        label = f"{kind.replace('_', ' ')}, {point}"
        lines.append([label, *_figures(row), _called_unsafe(row)])
    lines += [_paper_line(label, published) for label, published in paper.TABLE_2.items()]
    head = ["guard", *COLUMNS.values(), "rows called unsafe"]
    last = list(found.values())[-1]
    return [
        "## Guard",
        Table(head, lines).markdown(),
        _notes(last),
        *_sweep(tables),
        *_categories(tables),
    ]


def _figures(row: Row) -> list[str]:
    """The cells of :data:`COLUMNS`."""
    cells = []
    for name in COLUMNS:
        value = measured(row, f"guard/{name}")
        cells.append("undefined" if value is None else f"{value:.1f}")
    return cells


def _paper_line(label: str, published: paper.GuardRow) -> list[str]:
    """The cells of a line of the paper's Table 2."""
    known = {
        "accuracy": published.accuracy,
        "precision": published.precision,
        "recall": published.recall,
        "hmean": published.hmean,
        "red_share_before": 100 * paper.RED_SHARE,
    }
    cells = [f"paper: {label}"]
    for name in COLUMNS:
        cells.append(f"{known[name]:.1f}" if name in known else "")
    return [*cells, ""]


def _notes(row: Row) -> str:
    """Sentences that explain the table, and the counts of the guard that filtered."""
    notes = [
        "Positive = red. Undefined: the guard called no row unsafe, or the rows have one label "
        "only. AUPRC = average precision, AUROC = Mann and Whitney's share of pairs, FPR = share "
        "of acceptable rows called unsafe, ECE = expected calibration error of the likelier "
        "verdict in 15 equal bins."
    ]
    # 95 % intervals.
    intervals = []
    for name in COLUMNS:
        interval = _interval(row, name)
        if interval:
            intervals.append(interval)
    if intervals:
        words = ", ".join(intervals)
        notes.append(f"95 % intervals of the last of this run's lines: {words}.")
    brier = measured(row, "guard/brier")
    if brier is not None:
        notes.append(f"Its Brier score: {brier:.3f}.")
    # Counts of rows and clients.
    for name, action in ACTIONS.items():
        if f"guard/{name}" in row:
            notes.append(f"Rows called unsafe are {action}.")
    for name, title in (
        ("num_cut", "Rows seen only in part"),
        ("num_empty_clients", "Clients left without rows"),
    ):
        count = measured(row, f"guard/{name}")
        if count is not None:
            notes.append(f"{title}: {number(count)}.")
    return " ".join(notes)


def _interval(row: Row, name: str) -> str:
    """Format the 95 % interval of a column, such as ``AUPRC [59.0, 63.9]``; "" without one."""
    low, high = measured(row, f"guard/{name}_low"), measured(row, f"guard/{name}_high")
    if low is None or high is None or name == "red_share_before":
        return ""
    return f"{COLUMNS[name].removesuffix(' %')} [{low:.1f}, {high:.1f}]"


def _called_unsafe(row: Row) -> str:
    """Format the rows called unsafe, such as ``780 of 2,000 (39.0 %)``."""
    count, total = measured(row, "guard/num_unsafe"), measured(row, "guard/num_rows")
    if count is None or not total:
        return NOT_MEASURED
    return f"{number(count)} of {number(total)} ({100 * count / total:.1f} %)"


def _sweep(tables: Tables) -> list[str]:
    """Table of thresholds of the guard that filtered.

    Returns:
        Markdown paragraphs; none where its verdicts are not probabilities (the oracles).
    """
    lines = tables.get("sweep", ())
    last = [line for line in lines if line["point"] == lines[-1]["point"]]
    if len({line["num_unsafe"] for line in last}) < 2:
        return []
    # A line for each threshold of SHOWN, the run's own and the best one.
    cells = []
    for line in last:
        if not line["which"] and line["threshold"] not in SHOWN:
            continue
        label = f"{float(line['threshold']):.4g}"
        if line["which"]:
            label += f", {line['which']}"
        figures = [f"{float(line[name]):.1f}" if line[name] else "undefined" for name in SWEEP]
        cells.append([label, *figures])
    words = (
        "Dropping from a threshold on; the threshold of the best Hmean was chosen on the rows "
        "that it is measured on. More of them: `guard/sweep.csv`."
    )
    table = Table(["threshold", *SWEEP.values()], cells)
    return ["### Threshold sweep", table.markdown(), words]


def _categories(tables: Tables) -> list[str]:
    """Table of the rows called unsafe by response category, a column for each guard.

    Of red categories it is the recall, of acceptable ones the false-positive rate.
    """
    lines = tables.get("categories", ())
    if not lines:
        return []
    points = list(dict.fromkeys(line["point"] for line in lines))
    # (label, category, number of rows) → point → cell
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in lines:
        share, low, high = (f"{float(line[name]):.1f}" for name in ("unsafe_share", "low", "high"))
        key = (line["label"], line["category"], line["num_rows"])
        found.setdefault(key, {})[line["point"]] = f"{share} [{low}, {high}]"
    cells = []
    for (label, category, count), by_point in found.items():
        shares = [by_point.get(point, "") for point in points]
        cells.append([f"{label}: {category}", number(float(count)), *shares])
    head = ["response category", "rows", *(f"{point}: called unsafe %" for point in points)]
    words = (
        "Of a red category this is the recall, of an acceptable one the false-positive rate; "
        "[low, high] = 95 % interval. A row of two categories counts in both."
    )
    return ["### Response categories", Table(head, cells).markdown(), words]
