"""Dropped conversations: by reason, as a share, and what they take from an epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedsim.config import CaiConfig
from fedsim.safety.cai_data import CaiRow, count_metrics
from fedsim.safety.cai_usage import CaiUsage

SETTINGS = CaiConfig(iterations=-1, batch_size=16, max_new_tokens=512)


def conversation(i: int, response: str = "No.", truncated: tuple[Any, ...] = ()) -> CaiRow:
    return CaiRow(i, f"Who flies kite {i}?", response, "critic", "critique", "revise", "Orla.", 0, truncated)


def usage(num_cut: int, num_same: int, num_full: int, num_rows: int = 400) -> CaiUsage:
    """Of conversations that were cut off, left unchanged, or whose prompt fills the row."""
    rows = [conversation(i, truncated=("revision",)) for i in range(num_cut)]
    rows += [conversation(i, response="Orla.") for i in range(num_same)]
    rows += [conversation(i) for i in range(num_rows - len(rows))]
    good = num_rows - num_cut - num_same
    aligner: Any = SimpleNamespace(
        reasons=["no_targets"] * num_full + [None] * (good - num_full), num_cut=3, cai=SETTINGS
    )
    return CaiUsage.of(rows, aligner)


def test_counts_add_up_to_the_conversations() -> None:
    found = usage(100, 20, 5)
    assert found.tally.num_usable == 275
    rows = [conversation(i, truncated=("response",)) for i in range(100)] + [conversation(i) for i in range(300)]
    metrics = count_metrics(rows) | usage(100, 0, 5).metrics()
    dropped = sum(count for name, count in metrics.items() if name.startswith("cai/num_dropped_"))
    assert metrics["cai/num_usable"] + dropped == metrics["cai/num_rows"] == 400
    assert metrics["cai/num_usable"] == 295 and metrics["cai/num_dropped_no_targets"] == 5


def test_an_epoch_shrinks_with_its_rows_and_says_so() -> None:
    """400 rows of 16 are 25 iterations; 275 are 18."""
    found = usage(100, 20, 5)
    assert (found.epoch, found.full_epoch) == (18, 25)
    assert found.metrics()["cai/num_epoch_iterations"] == 18
    assert found.metrics()["cai/num_epoch_iterations_of_all_rows"] == 25
    line, warning = found.words()
    assert line == (
        "CAI rows: 125 of 400 dropped, 31 % (100 cut off (by cai.max_new_tokens=512 or the model's context), 20 with "
        "an unchanged revision, 5 whose prompt fills cai.max_length=1024); 3 replies cut to fit; an epoch has 18 "
        "iteration(s) instead of 25"
    )
    assert warning.startswith("warning: 31 % of the CAI rows are dropped")
    assert warning.endswith("raise cai.max_new_tokens, raise cai.max_length")


@pytest.mark.parametrize(("num_cut", "warns"), [(0, False), (40, False), (41, True), (399, True)])
def test_a_warning_from_more_than_a_tenth_on(num_cut: int, warns: bool) -> None:
    lines = usage(num_cut, 0, 0).words()
    assert (len(lines) == 2) == warns
    assert ("instead of" in lines[0]) == (-(-(400 - num_cut) // 16) != 25)
    assert not warns or "raise cai.max_new_tokens" in lines[1]


def test_a_model_that_revises_nothing_has_no_setting_to_raise() -> None:
    assert usage(0, 100, 0).words()[1].endswith("the model itself leaves nothing to learn in them")
