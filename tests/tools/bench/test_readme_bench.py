"""The README's tables come from the rows' files."""

from __future__ import annotations

from pathlib import Path

from tools.bench.rows import Percentiles, Row, StageResult, Target
from tools.readme_bench import markdown

FACTS = {
    "device": "A Processor",
    "threads": 2,
    "model": "micro",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "trl": None},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
}


def test_rows_with_a_target_are_shown_by_device(tmp_path: Path) -> None:
    one = Percentiles(1.0, 1.0, 1.0)
    met = Row("a", "fast", "float32", {}, one, 3, peer="p", peer_seconds=Percentiles(2, 2, 2), floor_s=0.5,
              target=Target("ratio", 1.5))  # fmt: skip
    missed = Row("b", "share", "float32", {}, figures={"share": 0.4}, target=Target("share", 0.33, at_most=True))
    untold = Row("b", "aside", "float32", {}, one, 3)
    for device, rows in (("cpu", [met]), ("gpu", [missed, untold])):
        StageResult(rows[0].stage, FACTS, [], rows).write(tmp_path / device / f"{rows[0].stage}.json")
    lines = markdown(tmp_path).splitlines()
    assert lines[2] == "| a | fast | p | 1 s | 2 s | ratio ≥ 1.5 | 2 | 50 % |"
    assert lines[4] == (
        "Measured on A Processor, 2 thread(s), micro, torch 2.13.0, transformers 5.23.0, peft 0.21.2, no TRL, "
        "2026-01-02, commit 0123456789 (a)."
    )
    assert "| b | share | – | – | – | share ≤ 0.33 | 0.4 (missed) | – |" in lines
    assert not any("aside" in line for line in lines)


def test_nothing_is_said_of_what_was_not_measured(tmp_path: Path) -> None:
    assert markdown(tmp_path / "none") == "No rows are committed yet."
