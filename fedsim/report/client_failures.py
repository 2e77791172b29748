"""The part of ``summary.md`` on clients that failed, dropped out or were slow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsim.base.tables import Table, measured
from fedsim.record.metrics import Row

FAILED = "client/failed_"
"""Before a client's number: the metric that holds the reason of its failure."""

_FAILED = re.compile(rf"{FAILED}(\d{{3,}})")
_MOST_ROUNDS = 20


def section(rows: Sequence[Row]) -> list[str]:
    """Client × reason × rounds, and the totals of simulated drop-outs and stragglers; empty where there are none."""
    rounds: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        for name, reason in row.items():
            if found := _FAILED.fullmatch(name):
                rounds.setdefault((int(found[1]), str(reason)), []).append(row["round"])
    dropped, slow = (
        sum(int(measured(row, f"client/num_{name}") or 0) for row in rows) for name in ("dropped_out", "stragglers")
    )
    if not (rounds or dropped or slow):
        return []
    parts = ["## Clients that failed, dropped out or were slow"]
    if rounds:
        lines = [
            [str(client), reason, _listed(found), str(len(found))] for (client, reason), found in sorted(rounds.items())
        ]
        parts.append(Table(["client", "reason", "rounds", "times"], lines, num_text=3).markdown())
    simulated = {"drop-outs": dropped, "stragglers": slow}
    counts = [f"- simulated {what}: {count:,} over all rounds" for what, count in simulated.items() if count]
    return [*parts, "\n".join(counts)] if counts else parts


def _listed(rounds: Sequence[int]) -> str:
    return ", ".join(map(str, rounds[:_MOST_ROUNDS])) + (", …" if len(rounds) > _MOST_ROUNDS else "")
