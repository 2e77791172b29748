"""Figures of CAI's texts by hand."""

from __future__ import annotations

import pytest

from fedsim import figures
from fedsim.safety.cai_data import CaiRow


def row(response: str, revision: str) -> CaiRow:
    return CaiRow(0, "Who?", response, "Critique?", "Short.", "Revise.", revision, 0)


def test_signs_of_collapse_in_responses_and_revisions() -> None:
    rows = [row("It is Orla.", "no no no no no no no no"), row("It is Pim.", ""), row("", "I cannot know.")]
    assert figures.of_cai_texts(rows) == pytest.approx({
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
