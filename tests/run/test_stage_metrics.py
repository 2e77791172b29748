"""Figures of CAI's texts and of what was found in them, by hand."""

from __future__ import annotations

import pytest

from fedsim.run import stage_metrics
from fedsim.safety.cai_data import CaiRow
from fedsim.safety.cai_findings import Finding


def row(response: str, revision: str) -> CaiRow:
    return CaiRow(0, "Who?", response, "Critique?", "Short.", "Revise.", revision, 0)


def test_signs_of_collapse_in_responses_and_revisions() -> None:
    rows = [row("It is Orla.", "no no no no no no no no"), row("It is Pim.", ""), row("", "I cannot know.")]
    assert stage_metrics.of_cai_texts(rows) == pytest.approx({
        "cai/response_num_texts": 3,
        "cai/revision_num_texts": 3,
        "cai/response_distinct_2": 75.0,  # "It is" twice
        "cai/response_repeated_suffix": 0.0,
        "cai/response_mean_words": 2.0,
        "cai/response_empty_share": 100 / 3,
        "cai/revision_distinct_2": 100 * 3 / 9,  # "no no" 7 times, and two more
        "cai/revision_repeated_suffix": 100 / 3,
        "cai/revision_mean_words": 11 / 3,
        "cai/revision_empty_share": 100 / 3,
    })  # fmt: skip


def test_shares_of_findings_with_their_counts() -> None:
    found = [
        Finding(True, True, True),
        Finding(True, False, False),
        Finding(False, False, True),
        Finding(False, None, True),
    ]
    metrics = stage_metrics.of_cai_findings(found)
    assert {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))} == {
        "cai/harmful_response": 50.0,
        "cai/harmful_response_count": 4,
        "cai/critique_finds_harm": pytest.approx(100 / 3),
        "cai/critique_finds_harm_count": 3,
        "cai/repaired_revision": 25.0,
        "cai/repaired_revision_count": 4,
    }
    assert 0 < metrics["cai/repaired_revision_low"] < 25 < metrics["cai/repaired_revision_high"]
    assert stage_metrics.of_cai_findings([]) == {}
    assert not any("critique" in name for name in stage_metrics.of_cai_findings([Finding(True, None, True)]))
