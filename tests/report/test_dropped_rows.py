"""The table of dropped rows in ``summary.md``: made of the metric rows alone."""

from __future__ import annotations

from typing import Any

from fedsim.report.dropped_rows import section

FILTER: dict[str, Any] = {
    "round": -1, "stage": "filter", "client/num_kept_rows": 6000, "client/num_dropped_no_targets": 35,
    "client/num_dropped_empty_reply": 2, "client/num_dropped_no_weight": 0, "client/num_cut_rows": 120,
}  # fmt: skip
CAI: dict[str, Any] = {
    "round": -1, "stage": "cai_data", "cai/num_rows": 400, "cai/num_usable": 275, "cai/num_dropped_truncated": 100,
    "cai/num_dropped_unchanged": 25, "cai/num_cut_rows": 0, "cai/num_epoch_iterations": 18,
    "cai/num_epoch_iterations_of_all_rows": 25,
}  # fmt: skip


def test_a_line_a_stage_with_reasons_and_percent() -> None:
    tuned = {"guard/tuning_num_rows": 2000, "guard/tuning_num_dropped_empty_reply": 1}
    heading, table, epoch = section([FILTER | tuned, CAI])
    assert heading == "## Rows without anything to learn"
    clients = "35 whose prompt fills local.max_length, 2 with an empty reply"
    conversations = "100 cut off (by cai.max_new_tokens or the model's context), 25 with an unchanged revision"
    assert table.splitlines()[2:] == [
        f"| clients' rows, after the filter | {clients} | 6,000 | 37 | 0.6 | 120 |",
        "| guard fine-tuning | 1 with an empty reply | 2,000 | 1 | 0.1 |  |",
        f"| CAI conversations | {conversations} | 400 | 125 | 31.2 | 0 |",
    ]
    assert epoch == "Iterations of an epoch over CAI's usable rows: 18; over all rows they would be 25."


def test_a_run_that_counted_nothing_has_no_such_section() -> None:
    """Runs of an earlier fedsim, of which a report is made."""
    assert section([]) == section([{"round": -1, "stage": "filter", "client/num_kept_rows": 5}]) == []
    assert len(section([FILTER])) == 2
