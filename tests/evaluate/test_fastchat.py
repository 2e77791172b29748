"""Rows and files as FastChat writes and reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedsim.data.benchmarks import MtQuestion
from fedsim.errors import ConfigError
from fedsim.evaluate.fastchat import answer_rows, judgment_rows, write_answers
from fedsim.evaluate.mt_bench import MtAnswer
from fedsim.generate.engine import Reply


def answer(number: int, scores: tuple[float, float] | None) -> MtAnswer:
    """A finished answer."""
    question = MtQuestion(number, "math", (f"One {number}?", f"Two {number}?"), None, {})
    return MtAnswer(question, (Reply(f"first {number} é", 3, False), Reply(f"second {number}", 3, False)), scores)


ANSWERS = [answer(82, (3.5, 9.0)), answer(81, (10.0, 1.0))]


def lines(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answer_rows() -> None:
    rows = answer_rows(ANSWERS, "fed-1", 12.5)
    assert [r["question_id"] for r in rows] == [81, 82]
    assert list(rows[0]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["first 81 é", "second 81"]}]
    assert (rows[0]["model_id"], rows[0]["tstamp"]) == ("fed-1", 12.5)
    assert len(rows[0]["answer_id"]) == 22  # as long as FastChat's short UUIDs
    ids = {r["answer_id"] for r in (*rows, *answer_rows(ANSWERS, "fed-2", 12.5))}
    assert len(ids) == 4
    assert answer_rows(ANSWERS, "fed-1", 99.0)[0]["answer_id"] == rows[0]["answer_id"]  # content, not time


def test_judgment_rows() -> None:
    rows = judgment_rows(ANSWERS, "fed-1", 12.5)
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (81, 1, 10.0),
        (82, 1, 3.5),
        (81, 2, 1.0),
        (82, 2, 9.0),
    ]
    assert list(rows[0]) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert [r["judge"][0] for r in rows] == ["rubric"] * 4
    assert rows[2]["user_prompt"] == "Two 81?"
    for row in rows:  # FastChat's own pattern finds the score in the judgment
        match = re.search(r"\[\[(\d+\.?\d*)\]\]", row["judgment"])
        assert match and float(match[1]) == row["score"]
    assert judgment_rows([answer(81, None)], "fed-1", 0.0) == []


def test_files(tmp_path: Path) -> None:
    paths = write_answers(tmp_path, ANSWERS, "fed-1", 12.5)
    assert paths == [
        tmp_path / "model_answer" / "fed-1.jsonl",
        tmp_path / "model_judgment" / "rubric_single.jsonl",
    ]
    assert lines(paths[0]) == answer_rows(ANSWERS, "fed-1", 12.5)
    assert lines(paths[1]) == judgment_rows(ANSWERS, "fed-1", 12.5)
    write_answers(tmp_path, ANSWERS[:1], "fed-2", 13.0)
    write_answers(tmp_path, ANSWERS, "fed-1", 14.0)  # written again: replaced, the other model's rows stay
    held = lines(paths[1])
    assert [r["model"] for r in held] == ["fed-2"] * 2 + ["fed-1"] * 4
    assert {r["tstamp"] for r in held} == {13.0, 14.0}
    assert not list(tmp_path.rglob("*.partial"))


def test_no_score_no_judgment_file(tmp_path: Path) -> None:
    assert write_answers(tmp_path, [answer(81, None)], "fed-1", 0.0) == [tmp_path / "model_answer" / "fed-1.jsonl"]
    assert not (tmp_path / "model_judgment").exists()


@pytest.mark.parametrize("model_id", ["", "meta-llama/Llama-3.1-8B"])
def test_model_id_names_a_file(tmp_path: Path, model_id: str) -> None:
    with pytest.raises(ConfigError, match="model id"):
        write_answers(tmp_path, ANSWERS, model_id, 0.0)
