"""Rank 0 waits for a judge longer than a collective may: the others meet it meanwhile, and nothing times out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import load_config
from fedsim.evaluate.judge import MtJudge
from fedsim.evaluate.judge_inputs import load_questions
from fedsim.evaluate.judge_openai import POLL_S
from fedsim.parallel.world import process_world

TIMEOUT_S = 4.0


def judge(words: list[str], folder: str) -> tuple[list[Any], int, float]:
    """Scores, turns without a judgment, and seconds."""
    import openai  # noqa: F401  takes seconds, and is no wait for a judge

    config, began = load_config(None, words), time.monotonic()
    answered = [(question, ("first", "second")) for question in load_questions(config)]

    with process_world(exact=True, threads=1, timeout_s=TIMEOUT_S, device="cpu") as world:
        found = MtJudge(config, world.ranks, torch.device("cpu")).judge(Path(folder), "fed-1", answered)
    return found.scores, found.num_unjudged, time.monotonic() - began


@pytest.mark.deep
def test_a_long_pause_ends_no_other_rank(pool: Any, endpoint: Any, mt_folder: Path, tmp_path: Path) -> None:
    assert TIMEOUT_S < POLL_S
    busy = endpoint.Answer(b"{}", 429, {"retry-after": str(3 * TIMEOUT_S)})
    endpoint.answer = lambda number, request: busy if number == 0 else "Rating: [[7]]"
    words = ["judge.kind=openai", f"judge.base_url={endpoint.url}", f"eval.mt_bench={mt_folder / 'question.jsonl'}",
             f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}", "judge.workers=1",
             f"parallel.timeout_s={TIMEOUT_S}"]  # fmt: skip
    results = pool.run(2, judge, words, str(tmp_path / "mt"))
    for scores, num_unjudged, seconds in results:
        assert scores == [(7.0, 7.0)] * 4 and num_unjudged == 0 and seconds > 3 * TIMEOUT_S
