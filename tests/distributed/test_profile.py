"""The round profiler on several ranks: all of them do the round twice, one prints and traces."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "local.steps=1"]


def profile(words: list[str]) -> str:
    """What this rank prints."""
    from fedsim.commands import profile as command

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command.profile(*command.parse([str(Path(__file__).parent / "small.yaml"), *words, "--round", "1"]))
    return printed.getvalue()


def test_two_ranks_profile_a_round_and_rank_0_prints_it(pool: Any, square_file: Path, tmp_path: Path) -> None:
    """What an earlier profile left behind is not resumed."""
    places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    (tmp_path / "small-profile").mkdir()
    (tmp_path / "small-profile" / ".profile").touch()
    (tmp_path / "small-profile" / "config.yaml").write_text("seed: 9")
    first, second = pool.run(2, profile, [*BRIEF, *places, "record.resume=never"])
    assert "Round 1 of small: FedAvg" in first and "2 processes on cpu" in first and second == ""
    assert "local training" in first and "evaluation" not in first and "constitutional" not in first
    assert [p.name for p in (tmp_path / "small-profile").glob("trace*")] == ["trace-round1.json.gz"]
