"""The guard in ``summary.md``: its figures beside the paper's Table 2, a threshold sweep, response categories."""

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
COLUMNS = {"accuracy": "accuracy %", "precision": "precision %", "recall": "recall %", "hmean": "Hmean %",
           "auprc": "AUPRC %", "auroc": "AUROC %", "fpr": "FPR %", "ece": "ECE %",
           "red_share_before": "red % before", "red_share_after": "red % after"}  # fmt: skip

#: What the filter does to the rows called unsafe, by the metric that counts them.
ACTIONS = {"num_dropped": "left out", "num_refused": "given a refusal for a response",
           "num_downweighted": "downweighted"}  # fmt: skip

SWEEP = {"accuracy": "accuracy %", "precision": "precision %", "recall": "recall %", "hmean": "Hmean %", "fpr": "FPR %",
         "dropped_share": "dropped %", "red_share_after": "red % after"}  # fmt: skip
SHOWN = ("0.1", "0.3", "0.5", "0.7", "0.9")
"""Thresholds of the sweep that the summary shows, beside the run's own and the best one; the file has all."""


def read_tables(folder: Path) -> Tables:
    """Every ``*.csv`` of the run directory's guard folder; none if there is no such folder."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            tables[path.stem] = list(csv.DictReader(stream))
    return tables


def guard(rows: Sequence[Row], kind: str, tables: Tables) -> list[str]:
    """One line for each ``point`` that rows with guard figures name, the paper's Table 2, and what the tables hold."""
    found = {str(row.get("point", "this run")): row for row in rows if measured(row, "guard/accuracy") is not None}
    if not found:
        return []
    lines = [
        [f"{kind.replace('_', ' ')}, {point}", *_figures(row), _called_unsafe(row)] for point, row in found.items()
    ]
    for label, published in paper.TABLE_2.items():
        known = {"accuracy": published.accuracy, "precision": published.precision, "recall": published.recall,
                 "hmean": published.hmean, "red_share_before": 100 * paper.RED_SHARE}  # fmt: skip
        cells = [f"{known[name]:.1f}" if name in known else "" for name in COLUMNS]
        lines.append([f"paper: {label}", *cells, ""])
    head = ["guard", *COLUMNS.values(), "rows called unsafe"]
    table = Table(head, lines).markdown()
    return ["## Guard", table, _notes(list(found.values())[-1]), *_sweep(tables), *_categories(tables)]


def _figures(row: Row) -> list[str]:
    return [
        f"{value:.1f}" if (value := measured(row, f"guard/{name}")) is not None else "undefined" for name in COLUMNS
    ]


def _notes(row: Row) -> str:
    """How to read the table, and the counts of the guard that filtered."""
    notes = [
        "Positive = red. Undefined: the guard called no row unsafe, or the rows have one label only. AUPRC = average "
        "precision, AUROC = Mann and Whitney's share of pairs, FPR = share of acceptable rows called unsafe, ECE = "
        "expected calibration error of the likelier verdict in 15 equal bins."
    ]
    intervals = [_interval(row, name) for name in COLUMNS]
    if any(intervals):
        notes.append(f"95 % intervals of the last of this run's lines: {', '.join(i for i in intervals if i)}.")
    brier = measured(row, "guard/brier")
    if brier is not None:
        notes.append(f"Its Brier score: {brier:.3f}.")
    notes += [f"Rows called unsafe are {done}." for name, done in ACTIONS.items() if f"guard/{name}" in row]
    for name, words in (("num_cut", "rows seen only in part"), ("num_empty_clients", "clients left without rows")):
        count = measured(row, f"guard/{name}")
        if count is not None:
            notes.append(f"{words[0].upper()}{words[1:]}: {number(count)}.")
    return " ".join(notes)


def _interval(row: Row, name: str) -> str:
    low, high = (measured(row, f"guard/{name}{end}") for end in ("_low", "_high"))
    if low is None or high is None or name == "red_share_before":
        return ""
    return f"{COLUMNS[name].removesuffix(' %')} [{low:.1f}, {high:.1f}]"


def _called_unsafe(row: Row) -> str:
    count, total = measured(row, "guard/num_unsafe"), measured(row, "guard/num_rows")
    if count is None or not total:
        return NOT_MEASURED
    return f"{number(count)} of {number(total)} ({100 * count / total:.1f} %)"


def _sweep(tables: Tables) -> list[str]:
    """The thresholds of the guard that filtered; nothing where its verdicts are not probabilities (the oracles)."""
    lines = _of_last_point(tables.get("sweep", ()))
    if len({line["num_unsafe"] for line in lines}) < 2:
        return []
    cells = []
    for line in lines:
        if line["which"] or line["threshold"] in SHOWN:
            label = f"{float(line['threshold']):.4g}{', ' if line['which'] else ''}{line['which']}"
            cells.append([label, *(f"{float(line[name]):.1f}" if line[name] else "undefined" for name in SWEEP)])
    words = (
        "Dropping from a threshold on; the threshold of the best Hmean was chosen on the rows that it is measured on. "
        "More of them: `guard/sweep.csv`."
    )
    return ["### Threshold sweep", Table(["threshold", *SWEEP.values()], cells).markdown(), words]


def _categories(tables: Tables) -> list[str]:
    """Rows called unsafe by response category: recall of the red ones, false-positive rate of the acceptable ones."""
    lines = tables.get("categories", ())
    if not lines:
        return []
    points = list(dict.fromkeys(line["point"] for line in lines))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in lines:
        share, low, high = (f"{float(line[name]):.1f}" for name in ("unsafe_share", "low", "high"))
        key = (line["label"], line["category"], line["num_rows"])
        cells.setdefault(key, {})[line["point"]] = f"{share} [{low}, {high}]"
    head = ["response category", "rows", *(f"{point}: called unsafe %" for point in points)]
    table = Table(
        head,
        [
            [f"{label}: {category}", number(float(count)), *(found.get(point, "") for point in points)]
            for (label, category, count), found in cells.items()
        ],
    )
    words = (
        "Of a red category this is the recall, of an acceptable one the false-positive rate; [low, high] = 95 % "
        "interval. A row of two categories counts in both."
    )
    return ["### Response categories", table.markdown(), words]


def _of_last_point(lines: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [line for line in lines if line["point"] == lines[-1]["point"]]
