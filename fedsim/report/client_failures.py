"""The part of ``summary.md`` on clients that failed, dropped out or were slow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsim.base.tables import Table
from fedsim.record.metrics import Row
from fedsim.report.sections import values_of

FAILED = "client/failed_"
"""Before a client's number: the metric that holds the reason of its failure."""

_FAILED = re.compile(rf"{FAILED}(\d{{3,}})")

_MOST_ROUNDS = 20
"""Rounds that a line of the table names at most."""


def section(rows: Sequence[Row]) -> list[str]:
    """Table of failures by client and reason, and totals of simulated drop-outs and stragglers.

    Returns:
        Markdown paragraphs; none where no client failed, dropped out or was slow.
    """
    # (client, reason) → rounds, from 1
    failures: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        for name, reason in row.items():
            found = _FAILED.fullmatch(name)
            if found is not None:
                failures.setdefault((int(found[1]), str(reason)), []).append(row["round"])
    dropped = int(sum(values_of(rows, "client/num_dropped_out")))
    slow = int(sum(values_of(rows, "client/num_stragglers")))
    if not (failures or dropped or slow):
        return []

    # A line for each client and reason.
    parts = ["## Clients that failed, dropped out or were slow"]
    if failures:
        lines = []
        for (client, reason), rounds in sorted(failures.items()):
            lines.append([str(client), reason, _listed(rounds), str(len(rounds))])
        table = Table(["client", "reason", "rounds", "times"], lines, num_text=3)
        parts.append(table.markdown())
    # Totals over all rounds.
    totals = []
    for title, count in (("drop-outs", dropped), ("stragglers", slow)):
        if count:
            totals.append(f"- simulated {title}: {count:,} over all rounds")
    if totals:
        parts.append("\n".join(totals))
    return parts


def _listed(rounds: Sequence[int]) -> str:
    """Join rounds by commas; the first ones where they are many."""
    words = [str(number) for number in rounds[:_MOST_ROUNDS]]
    if len(rounds) > _MOST_ROUNDS:
        words.append("…")
    return ", ".join(words)
