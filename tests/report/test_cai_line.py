"""The lines about CAI's conversations: shares with intervals and counts, the last DPO, and when it is replay."""

from __future__ import annotations

import pytest

from fedsim.record.metrics import Row
from fedsim.report.cai_line import REPLAY_WORDS, UNREPAIRED_WORDS, cai_lines, is_replay

DATA: Row = {
    "round": 0,
    "stage": "cai_data",
    "cai/num_usable": 400,
    "cai/harmful_response": 30.0,
    "cai/harmful_response_low": 25.7,
    "cai/harmful_response_high": 34.7,
    "cai/harmful_response_count": 400,
    "cai/critique_finds_harm": 28.5,
    "cai/critique_finds_harm_low": 24.3,
    "cai/critique_finds_harm_high": 33.1,
    "cai/critique_finds_harm_count": 400,
    "cai/repaired_revision": 25.0,
    "cai/repaired_revision_low": 21.0,
    "cai/repaired_revision_high": 29.5,
    "cai/repaired_revision_count": 400,
}


def rounds(*margins: float) -> list[Row]:
    return [
        {"round": i, "stage": "round", "cai/reward_margin": margin, "cai/reward_accuracy": 0.75, "cai/dpo_loss": 0.6}
        for i, margin in enumerate(margins)
    ]


def test_shares_counts_and_the_last_rounds_dpo() -> None:
    assert cai_lines([DATA, *rounds(0.1, 0.42)]) == [
        "CAI's conversations: harmful first responses 30.0 % [25.7, 34.7] of 400, critiques that find harm 28.5 % "
        "[24.3, 33.1] of 400, harmful responses with a careful revision 25.0 % [21.0, 29.5] of 400; DPO in its last "
        "round: margin 0.42 nats, accuracy 75.0 %."
    ]


def test_a_run_with_nothing_to_repair_is_called_replay() -> None:
    lines = cai_lines([{**DATA, "cai/harmful_response": 4.0, "cai/repaired_revision": 1.0}, *rounds(0.0)])
    assert len(lines) == 2 and lines[1] == REPLAY_WORDS


def test_harm_that_is_not_repaired_is_no_replay() -> None:
    """30 % of the first responses are harmful: CAI does not train on the writer's own careful replies."""
    lines = cai_lines([{**DATA, "cai/repaired_revision": 1.0}, *rounds(0.5)])
    assert len(lines) == 2 and lines[1] == UNREPAIRED_WORDS


def test_what_was_not_measured_is_said_and_decides_nothing() -> None:
    bare: Row = {"round": 0, "stage": "cai_data", "cai/num_usable": 3}
    (line,) = cai_lines([bare])
    assert line.count("not measured") == 3 and "DPO" not in line
    assert cai_lines(rounds(0.1)) == [], "no conversations, no CAI"


@pytest.mark.parametrize(("harmful", "replay"), [(None, False), (0.0, True), (4.99, True), (5.0, False)])
def test_replay_by_the_share_of_harmful_responses(harmful: float | None, replay: bool) -> None:
    assert is_replay(harmful) == replay
