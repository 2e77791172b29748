"""The part of ``summary.md`` on rows without anything to learn, dropped before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.base.tables import Table, measured, number
from fedsim.data.usable import REASONS, Tally
from fedsim.record.metrics import Row


@dataclass(frozen=True)
class Stage:
    """A stage that drops rows.

    Attributes:
        title: of its rows.
        total: metric of the number of rows.
        prefix: before ``num_dropped_<reason>``.
        cut: metric of the number of usable rows that were cut.
        keys: configuration keys that cut its rows, as texts of ``max_length`` and
            ``max_new_tokens`` in :data:`REASONS`.
    """

    title: str
    total: str
    prefix: str
    cut: str
    keys: dict[str, str]


STAGES = (
    Stage(
        "clients' rows, after the filter",
        "client/num_kept_rows",
        "client/",
        "client/num_cut_rows",
        {"max_length": "local.max_length"},
    ),
    Stage("guard fine-tuning", "guard/tuning_num_rows", "guard/tuning_", "", {}),
    Stage(
        "CAI conversations",
        "cai/num_rows",
        "cai/",
        "cai/num_cut_rows",
        {"max_length": "cai.max_length", "max_new_tokens": "cai.max_new_tokens"},
    ),
)


def section(rows: Sequence[Row]) -> list[str]:
    """Table with a line for each stage that counted its rows, and the length of CAI's epoch.

    Returns:
        Markdown paragraphs; none where no stage counted its rows.
    """
    lines = []
    for stage in STAGES:
        # The last row that has the figures is the run's own guard's, where several were compared.
        counted = [row for row in rows if stage.total in row and _dropped(row, stage) is not None]
        if counted:
            lines.append(_line(counted[-1], stage))
    if not lines:
        return []
    head = ["stage", "rows dropped before training and why"]
    head += ["rows", "dropped", "dropped %", "cut to fit"]
    table = Table(head, lines, num_text=2)
    return ["## Rows without anything to learn", table.markdown(), *_epoch(rows)]


def _dropped(row: Row, stage: Stage) -> dict[str, int] | None:
    """Counts by reason; None where the stage has recorded none, not even 0."""
    found = {}
    for reason in REASONS:
        name = f"{stage.prefix}num_dropped_{reason}"
        if name in row:
            found[reason] = int(measured(row, name) or 0)
    return found or None


def _line(row: Row, stage: Stage) -> list[str]:
    """The stage's cells: title, reasons, rows, dropped rows, their share in percent, cut rows."""
    counts = _dropped(row, stage) or {}
    dropped = {reason: count for reason, count in counts.items() if count}
    tally = Tally(int(measured(row, stage.total) or 0), dropped)
    cut = measured(row, stage.cut)  # None for a stage that cuts no rows
    return [
        stage.title,
        tally.reasons(**stage.keys),
        number(tally.num_rows),
        number(tally.num_dropped),
        f"{100 * tally.dropped_share:.1f}",
        "" if cut is None else number(cut),
    ]


def _epoch(rows: Sequence[Row]) -> list[str]:
    """A line with an epoch's iterations over the usable rows and over all; none without CAI."""
    usable, every = "cai/num_epoch_iterations", "cai/num_epoch_iterations_of_all_rows"
    counted = [row for row in rows if usable in row and every in row]
    if not counted:
        return []
    left, full = number(measured(counted[-1], usable)), number(measured(counted[-1], every))
    line = f"Iterations of an epoch over CAI's usable rows: {left}; over all rows they would be"
    return [f"{line} {full}."]
