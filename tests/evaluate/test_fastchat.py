"""Rows and files as FastChat writes and reads them."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.errors import ConfigError, DataError
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.fastchat import (
    FAILED,
    UNRATED,
    JudgmentFile,
    answer_rows,
    judgment_row,
    read_answers,
    rubric_rows,
    write_answers,
)
from fedsim.evaluate.mt_bench import MtAnswer, TurnScores
from fedsim.generate.engine import Reply


def answer(number: int, scores: TurnScores = (None, None)) -> MtAnswer:
    """A finished answer."""
    question = MtQuestion(number, "math", (f"One {number}?", f"Two {number}?"), None, {})
    return MtAnswer(question, (Reply(f"first {number} é", 3, False), Reply(f"second {number}", 3, False)), scores)


ANSWERS = [answer(82, (3.5, 9.0)), answer(81, (10.0, 1.0))]


def judgment(number: int, model: str = "fed-1", turn: int = 1, judge: str = "kite/judge") -> dict[str, Any]:
    """A judgment as :func:`judgment_row` makes it."""
    return judgment_row(number, model, (judge, "single-v1"), f"Rate {number}.", "Rating: [[5]] é", 5, turn, 1.5)


def lines(path: Path) -> list[dict[str, Any]]:
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


def test_rubric_rows() -> None:
    rows = rubric_rows(ANSWERS, "fed-1", 12.5)
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (82, 1, 3.5),
        (82, 2, 9.0),
        (81, 1, 10.0),
        (81, 2, 1.0),
    ]
    assert list(rows[0]) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert [r["judge"] for r in rows[:2]] == [["rubric", "rubric"], ["rubric", "rubric-multi-turn"]]
    assert rows[1]["user_prompt"] == "Two 82?"
    for row in rows:  # FastChat's own pattern finds the score in the judgment
        match = re.search(r"\[\[(\d+\.?\d*)\]\]", row["judgment"])
        assert match and float(match[1]) == row["score"]
    assert rubric_rows([answer(81)], "fed-1", 0.0) == []


def test_files_of_a_rubric(tmp_path: Path) -> None:
    paths = write_answers(tmp_path, ANSWERS, "fed-1", 12.5)
    assert paths == [
        tmp_path / "model_answer" / "fed-1.jsonl",
        tmp_path / "model_judgment" / "rubric_single.jsonl",
    ]
    assert lines(paths[0]) == answer_rows(ANSWERS, "fed-1", 12.5)
    assert [(r["question_id"], r["turn"]) for r in lines(paths[1])] == [(81, 1), (81, 2), (82, 1), (82, 2)]
    write_answers(tmp_path, ANSWERS[:1], "fed-0", 13.0)
    write_answers(tmp_path, ANSWERS, "fed-1", 14.0)  # written again: replaced, the other model's rows stay
    held = lines(paths[1])
    assert [r["model"] for r in held] == ["fed-0"] * 2 + ["fed-1"] * 4
    assert {r["tstamp"] for r in held} == {13.0, 14.0}
    assert not list(tmp_path.rglob("*.partial"))


def test_no_score_no_judgment_file(tmp_path: Path) -> None:
    assert write_answers(tmp_path, [answer(81)], "fed-1", 0.0) == [tmp_path / "model_answer" / "fed-1.jsonl"]
    assert not (tmp_path / "model_judgment").exists()


@pytest.mark.parametrize("model_id", ["", "meta-llama/Llama-3.1-8B"])
def test_model_id_names_a_file(tmp_path: Path, model_id: str) -> None:
    with pytest.raises(ConfigError, match="model id"):
        write_answers(tmp_path, ANSWERS, model_id, 0.0)


def test_answers_are_read_back(tmp_path: Path) -> None:
    (path,) = write_answers(tmp_path, [answer(82), answer(81)], "fed-1", 12.5)
    assert read_answers(path) == {81: ("first 81 é", "second 81"), 82: ("first 82 é", "second 82")}


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"question_id": "81"}, "'question_id'"),
        ({"choices": []}, "'choices'"),
        ({"choices": [{"turns": ["one"]}]}, "'choices'"),
        ({"choices": "x"}, "'choices'"),
        ({"choices": [None]}, "'choices'"),
        ({"question_id": 80}, "80 occurs twice"),
    ],
)
def test_malformed_answers(tmp_path: Path, changed: dict[str, Any], fragment: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"question_id": 80, "choices": [{"turns": ["a", "b"]}]},
        {"question_id": 81, "choices": [{"turns": ["a", "b"]}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], {**rows[1], **changed})), encoding="utf-8")
    with pytest.raises(DataError, match=f"line 2: .*{fragment}"):
        read_answers(path)


def test_a_judgment_is_on_disk_at_once(tmp_path: Path) -> None:
    file = JudgmentFile(tmp_path, "kite/judge")
    assert file.path == tmp_path / "model_judgment" / "kite--judge_single.jsonl" and file.rows() == []
    for number in (82, 81):
        file.append(judgment(number))
        assert lines(file.path)[-1] == judgment(number)
    assert file.rows() == [judgment(82), judgment(81)]


def test_replacing_sorts_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    file = JudgmentFile(tmp_path, "kite/judge")
    others = [judgment(81, "z"), judgment(90, "a"), judgment(83, "fed-1", judge="another"), judgment(81, "a", turn=2)]
    for row in [*others, judgment(84)]:
        file.append(row)
    own = [judgment(82, turn=2), judgment(82), judgment(81)]
    file.replace("fed-1", own)
    assert file.rows() == [others[3], others[1], own[2], own[1], own[0], others[2], others[0]]
    file.replace("fed-1", [])
    assert len(file.rows()) == 4


@pytest.mark.parametrize(
    "torn", ['{"question_id": 83, "mod', "{", '{"judgment": "é'.encode()[:-1].decode(errors="ignore")]
)
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    file = JudgmentFile(tmp_path, "kite/judge")
    file.append(judgment(81))
    with file.path.open("ab") as raw:
        raw.write(torn.encode())
    assert file.rows() == [judgment(81)]
    file.append(judgment(82))
    assert file.rows() == lines(file.path) == [judgment(81), judgment(82)]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    file = JudgmentFile(tmp_path, "kite/judge")
    file.append(judgment(81))
    file.path.write_text(file.path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert file.rows() == [judgment(81)]
    file.append(judgment(82))
    assert file.rows() == [judgment(81), judgment(82)]


@pytest.mark.parametrize("line", ["{", "[1]", '{"question_id": 81}', json.dumps({**judgment(81), "score": None}),
                                  json.dumps({**judgment(81), "judge": []})])  # fmt: skip
def test_a_line_that_is_no_judgment_is_an_error(tmp_path: Path, line: str) -> None:
    file = JudgmentFile(tmp_path, "kite/judge")
    file.append(judgment(81))
    file.path.write_text(f"{file.path.read_text(encoding='utf-8')}{line}\n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"kite--judge_single\.jsonl, line 2: is no FastChat judgment"):
        file.rows()


def test_merging_keeps_what_holds(tmp_path: Path) -> None:
    """One's own before the file's, a judgment before a row that says there is none, and one row of each turn."""
    file = JudgmentFile(tmp_path, "kite/judge")
    failed = {"judgment": FAILED, "score": UNRATED}
    file.append(judgment(81) | {"judgment": "old"})
    for row in (judgment(82), judgment(83) | failed, judgment(84), judgment(84), judgment(85), judgment(81, "other")):
        file.append(row)
    own = [judgment(81) | {"judgment": "new"}, judgment(82) | failed, judgment(83), judgment(86) | failed]
    merged = file.merge("fed-1", {(r["question_id"], 1): r for r in own}, lambda row: row["question_id"] != 85)
    assert list(merged.values()) == [own[0], judgment(82), own[2], judgment(84), own[3]]
    assert file.rows() == [*merged.values(), judgment(81, "other")]
    stamp = file.path.stat().st_mtime_ns
    assert file.merge("fed-1", {}, lambda row: True) == merged and file.path.stat().st_mtime_ns == stamp


def test_two_mergers_of_one_model_lose_nothing_of_each_others(tmp_path: Path) -> None:
    def merges(first: int) -> None:
        file = JudgmentFile(tmp_path, "kite/judge")
        for number in range(first, first + 30):
            file.merge("fed-1", {(number, 1): judgment(number)}, lambda row: True)

    threads = [threading.Thread(target=merges, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [row["question_id"] for row in JudgmentFile(tmp_path, "kite/judge").rows()]
    assert numbers == [*range(30), *range(100, 130)]


def test_two_writers_lose_nothing_of_each_others(tmp_path: Path) -> None:
    """One appends the judgments of a model while another replaces its own, over and over."""

    def appends() -> None:
        file = JudgmentFile(tmp_path, "kite/judge")
        for number in range(40):
            file.append(judgment(number, "slow"))

    thread = threading.Thread(target=appends)
    thread.start()
    file = JudgmentFile(tmp_path, "kite/judge")
    while thread.is_alive():
        file.replace("fast", [judgment(81, "fast")])
    thread.join()
    assert [r["question_id"] for r in file.rows() if r["model"] == "slow"] == list(range(40))
    assert sum(r["model"] == "fast" for r in file.rows()) == 1
