"""Tables of a guard as tidy CSV files: threshold sweep, calibration, categories, clients.

One line a threshold, bin, category or client, its ``point`` first (such as "untuned" or
"fine-tuned"); rates are in percent, an undefined one is empty. No text of a row is written.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsim.safety import guard_curves
from fedsim.safety.filtering import Filtered
from fedsim.safety.guard_curves import GRID

Line = dict[str, str | int | float | None]


def write_tables(folder: Path, points: Mapping[str, Filtered], threshold: float) -> None:
    """Write ``sweep.csv``, ``calibration.csv``, ``categories.csv`` and ``clients.csv``.

    Args:
        folder: where the files are written; made if it is not there.
        points: results of the filter, by title.
        threshold: the run's own; it is swept too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Line]] = {
        "sweep": [],
        "calibration": [],
        "categories": [],
        "clients": [],
    }
    for title, found in points.items():
        tables["sweep"] += _sweep(title, found, threshold)
        tables["calibration"] += _calibration(title, found)
        tables["categories"] += _categories(title, found)
        tables["clients"] += _clients(title, found)
    # One file a table; its columns are the keys of its lines.
    for name, lines in tables.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


def _sweep(title: str, found: Filtered, threshold: float) -> Iterator[Line]:
    """Yield every threshold with its counts and the share of red rows that dropping would leave."""
    red, probs = _columns(found)
    for point in guard_curves.sweep(red, probs, sorted({*GRID, threshold})):
        counts = point.counts
        which = "of the run" if point.threshold == threshold else ""
        if point.chosen:
            which = "best Hmean on these rows"
        yield {
            "point": title,
            "threshold": point.threshold,
            "which": which,
            "num_rows": counts.num_rows,
            "num_red": counts.num_red,
            "num_unsafe": counts.num_unsafe,
            "num_caught": counts.num_caught,
            "accuracy": _percent(counts.accuracy),
            "precision": _percent(counts.precision),
            "recall": _percent(counts.recall),
            "hmean": _percent(counts.hmean),
            "fpr": _percent(counts.fpr),
            "dropped_share": _percent(counts.unsafe_share),
            "red_share_after": _percent(counts.red_share_after),
        }


def _calibration(title: str, found: Filtered) -> Iterator[Line]:
    """Yield the calibration bins; an empty one has no confidence and no accuracy."""
    for place in guard_curves.calibration_bins(*_columns(found)):
        confidence = accuracy = None
        if place.num_rows:
            confidence, accuracy = place.confidence, place.num_right / place.num_rows
        yield {
            "point": title,
            "low": place.low,
            "high": place.high,
            "num_rows": place.num_rows,
            "num_right": place.num_right,
            "confidence": _percent(confidence),
            "accuracy": _percent(accuracy),
        }


def _categories(title: str, found: Filtered) -> Iterator[Line]:
    """Yield the share of rows called unsafe by label and response category."""
    rows, verdicts = found.judged
    labels, calls = [row.red for row in rows], [verdict.unsafe for verdict in verdicts]
    for rate in guard_curves.by_category(labels, calls, [row.categories for row in rows]):
        low, high = rate.unsafe.percent_interval
        yield {
            "point": title,
            "label": "red" if rate.red else "acceptable",
            "category": rate.category,
            "num_rows": rate.unsafe.total,
            "num_unsafe": rate.unsafe.successes,
            "unsafe_share": rate.unsafe.percent,
            "low": low,
            "high": high,
        }


def _clients(title: str, found: Filtered) -> Iterator[Line]:
    """Yield each client's counts, and its rows after the action."""
    for client, (counts, shard) in enumerate(zip(found.clients, found.shards, strict=True)):
        yield {
            "point": title,
            "client": client,
            "num_rows": counts.num_rows,
            "num_red": counts.num_red,
            "num_unsafe": counts.num_unsafe,
            "num_caught": counts.num_caught,
            "num_kept_rows": len(shard),
            "kept_weight": sum(row.weight for row in shard),
            "red_share_before": _percent(counts.red_share_before),
            "red_share_after": _percent(found.action.red_share_after(counts)),
        }


def _columns(found: Filtered) -> tuple[list[bool], list[float]]:
    """Return labels and probabilities of "unsafe" of all rows."""
    rows, verdicts = found.judged
    return [row.red for row in rows], [verdict.unsafe_prob for verdict in verdicts]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share
