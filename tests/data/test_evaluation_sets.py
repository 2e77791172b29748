"""Readers of AdvBench, HHH and MT-Bench files: real formats, and one error per fault that names the place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedsim import world
from fedsim.base.errors import DataError
from fedsim.data.chat import assistant_turn, user_turn
from fedsim.data.evaluation_sets import AdvBenchItem, HhhItem, load_advbench, load_hhh, load_mt_bench
from fedsim.evaluate.intervals import Rate

SECRET = "hush-hush"
"""Stands in each faulty row; no message may quote it."""


def write(path: Path, *records: Any) -> Path:
    """A JSON-lines file; text is written as it is."""
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def hhh_record(**changed: Any) -> dict[str, Any]:
    """A row in the published form, whole conversations in both texts; (B) is right."""
    talk = "\n\nHuman: Where is Orla?\n\nAssistant: At the park.\n\nHuman: Sure?\n\nAssistant: "
    record = {
        "prompt": "\n\nConsider this:\n\nHuman: Where is Orla?\n\nAssistant: At the park.\n\nHuman: Sure?\n\n\nChoose. "
        f"Options:\n (A) [[[Yes! {SECRET}]]]\n (B) [[[I cannot see her.\n\nShe may have left.]]]\n\nThe answer is:",
        "corrects": [" (B)"],
        "incorrects": [" (A)"],
        "text_correct": f"{talk}I cannot see her.\n\nShe may have left.",
        "text_incorrect": f"{talk}Yes! {SECRET}",
    }
    record.update(changed)
    return {name: value for name, value in record.items() if value is not None}


def mt_record(**changed: Any) -> dict[str, Any]:
    """A row of question.jsonl."""
    record = {"question_id": 81, "category": "writing", "turns": [SECRET, "Again."], "reference": ["One.", ""]}
    record.update(changed)
    return {name: value for name, value in record.items() if value is not None}


def expect_error(fragments: tuple[str, ...], load: Any, path: Path) -> None:
    """One DataError that names the file and the fragments and quotes nothing of the data."""
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert all(f in message for f in (path.name, *fragments)), message
    assert SECRET not in message and "\n" not in message
    assert caught.value.__cause__ is None  # no chained error that quotes the data either


def test_advbench_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'goal,target\nHide the kite,"Sure, here is a plan"\n"Say ""hi"", twice","Sure,\nhi"\n', encoding="utf-8"
    )
    items = load_advbench(path)
    assert items == [
        AdvBenchItem("Hide the kite", "Sure, here is a plan"),
        AdvBenchItem('Say "hi", twice', "Sure,\nhi"),
    ]
    assert items[0].prompt == "Hide the kite."


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("goal,answer\na,b\n", ("line 1", "'target'")),
        ("", ("line 1", "'goal'")),
        ("goal,target\n", ("no rows",)),
        (f"goal,target\na,b\n{SECRET},\n", ("line 3", "'target'")),
        (f"goal,target\n  ,{SECRET}\n", ("line 2", "'goal'")),
        (f"goal,target\n{SECRET}\n", ("line 2", "'target'")),
        (f"goal,target\na,b\nc,d\n{SECRET},e,f\n", ("line 4", "more fields")),
    ],
)
def test_malformed_advbench(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    expect_error(fragments, load_advbench, path)


def test_hhh_published_form(tmp_path: Path) -> None:
    record = hhh_record()
    [item] = load_hhh(write(tmp_path / "h.jsonl", record))
    assert item.options == (f"Yes! {SECRET}", "I cannot see her.\n\nShe may have left.")
    assert item.correct == 1
    assert item.context == (user_turn("Where is Orla?"), assistant_turn("At the park."), user_turn("Sure?"))
    assert item.prompt() == record["prompt"]


def test_hhh_bare_replies(tmp_path: Path) -> None:
    """Texts that are the reply alone: what stands before "Options:" is the question."""
    prompt = "Is it red?\n\nOptions:\n (A) [[[Yes.]]]\n (B) [[[No.]]]\n\nThe answer is:"
    record = hhh_record(
        prompt=prompt, corrects=[" (A)"], incorrects=[" (B)"], text_correct="Yes.", text_incorrect="No."
    )
    [item] = load_hhh(write(tmp_path / "h.jsonl", record))
    assert item == HhhItem("Is it red?\n\n", ("Yes.", "No."), 0, (user_turn("Is it red?"),))
    assert item.prompt(swapped=True) == prompt.replace("Yes", "x").replace("No", "Yes").replace("x", "No")


def test_always_answering_a_scores_52_percent(tmp_path: Path) -> None:
    """228 of 438 items have (A); the interval at that size is ± 4.7 points."""
    letters = {True: [" (A)"], False: [" (B)"]}
    records = []
    for i in range(438):
        first = i % 73 < 38  # 228 times
        a, b = ("Yes.", "No.") if first else ("No.", "Yes.")
        records.append(
            {
                "prompt": f"Is {i} red?\n\nOptions:\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\nThe answer is:",
                "corrects": letters[first],
                "incorrects": letters[not first],
                "text_correct": "Yes.",
                "text_incorrect": "No.",
            }
        )
    items = load_hhh(write(tmp_path / "h.jsonl", *records))
    rate = Rate.of([item.correct == 0 for item in items])
    assert rate.percent == pytest.approx(52.05, abs=0.005)
    low, high = rate.percent_interval
    assert (high - low) / 2 == pytest.approx(4.7, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"prompt": None}, ("'prompt'",)),
        ({"prompt": f"{SECRET} The answer is:"}, ("'prompt'", "Options")),
        ({"prompt": hhh_record()["prompt"] + " (A)"}, ("'prompt'",)),
        ({"corrects": " (B)"}, ("'corrects'", '[" (A)"]')),
        ({"corrects": [" (B)", " (A)"]}, ("'corrects'",)),
        ({"corrects": ["(B)"]}, ("'corrects'",)),
        ({"corrects": [" (A)"]}, ("'corrects'", "'incorrects'")),
        ({"text_correct": 3}, ("'text_correct'",)),
        ({"text_correct": "\n\nHuman: Hi\n\nAssistant: other"}, ("'text_correct'", "(B)")),
        ({"text_incorrect": f"\n\nHuman: Other?\n\nAssistant: Yes! {SECRET}"}, ("'text_correct'", "'text_incorrect'")),
        ({"text_incorrect": f"\n\nHuman: Yes! {SECRET}"}, ("'text_incorrect'", "alternate")),
        ({"text_incorrect": f"Human: A\n\nHuman: B\n\nAssistant: Yes! {SECRET}"}, ("'text_incorrect'", "alternate")),
        ({"text_incorrect": f"\n\nHuman:\n\nAssistant: Yes! {SECRET}"}, ("'text_incorrect'", "words in each")),
    ],
)
def test_malformed_hhh(tmp_path: Path, changed: dict[str, Any], fragments: tuple[str, ...]) -> None:
    path = write(tmp_path / "h.jsonl", hhh_record(), "", hhh_record(**changed))
    expect_error(("line 3", *fragments), load_hhh, path)


def test_hhh_bare_reply_needs_a_question(tmp_path: Path) -> None:
    prompt = hhh_record()["prompt"]
    record = hhh_record(
        prompt=prompt[prompt.index("Options") :],
    )
    record["text_correct"] = "I cannot see her.\n\nShe may have left."
    expect_error(("line 1", "'text_correct'", "question"), load_hhh, write(tmp_path / "h.jsonl", record))


def test_mt_bench_file_or_directory(tmp_path: Path) -> None:
    records = [mt_record(), mt_record(question_id=82, reference=None, turns=["Line\u2028break?", "And?"])]
    path = write(tmp_path / "question.jsonl", *records)
    questions = load_mt_bench(path)
    assert load_mt_bench(tmp_path) == questions
    assert [q.question_id for q in questions] == [81, 82]
    assert questions[0].turns == (SECRET, "Again.") and questions[0].reference == ("One.", "")
    assert questions[1].reference is None and questions[1].turns[0] == "Line\u2028break?"
    assert questions[1].record == records[1]


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"question_id": "81"}, ("'question_id'",)),
        ({"question_id": True}, ("'question_id'",)),
        ({"category": None}, ("'category'",)),
        ({"turns": ["One."]}, ("'turns'", "two")),
        ({"turns": ["One.", " "]}, ("'turns'",)),
        ({"turns": SECRET}, ("'turns'",)),
        ({"reference": ["One."]}, ("'reference'",)),
        ({"question_id": 80}, ("80", "twice")),
    ],
)
def test_malformed_mt_bench(tmp_path: Path, changed: dict[str, Any], fragments: tuple[str, ...]) -> None:
    path = write(tmp_path / "question.jsonl", mt_record(question_id=80), mt_record(**changed))
    expect_error(("line 2", *fragments), load_mt_bench, path)


@pytest.mark.parametrize("load", [load_hhh, load_mt_bench])
def test_faults_of_any_json_lines_file(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "x.jsonl"
    expect_error(("cannot be read",), load, path)
    expect_error(("no rows",), load, write(path, "", "  "))
    expect_error(("line 2", "not JSON", "column"), load, write(path, "", '{"a": ' + SECRET))
    expect_error(("row 1", "object", "str"), load, write(path, [SECRET]))
    expect_error(("line 1", "JSON array of objects, or JSON lines"), load, write(path, f'"{SECRET}"'))
    expect_error(("line 1", "is one object and no row"), load, write(path, {"rows": [SECRET]}))
    path.write_bytes(b'\n\n{"a": "' + SECRET.encode() + b'\xff"}\n')
    expect_error(("line 3", "UTF-8"), load, path)


@pytest.mark.parametrize(
    ("goal", "prompt"),
    [
        ("Describe a kite", "Describe a kite."),
        ("Describe a kite.", "Describe a kite."),
        ("How do kites fly?", "How do kites fly?"),
        ("Fly!", "Fly!"),
        ("So they fly...", "So they fly..."),
        ("So they fly\u2026", "So they fly\u2026"),
        ("Name the kites:", "Name the kites:"),
        ("\u5982\u4f55\u653e\u98ce\u7b5d\uff1f", "\u5982\u4f55\u653e\u98ce\u7b5d\uff1f"),
        ("\u653e\u98ce\u7b5d\u3002", "\u653e\u98ce\u7b5d\u3002"),
        ("\u653e\u98ce\u7b5d\uff01\u300d", "\u653e\u98ce\u7b5d\uff01\u300d"),
        ("\u0643\u064a\u0641\u061f", "\u0643\u064a\u0641\u061f"),
        ('Write "Kites fly."', 'Write "Kites fly."'),
        ("Write \u201cKites fly!\u201d", "Write \u201cKites fly!\u201d"),
        ("Write (they fly.)", "Write (they fly.)"),
        ('Write "kites"', 'Write "kites".'),
        ("Draw a kite (red)", "Draw a kite (red)."),
        ("Draw 3,5 kites", "Draw 3,5 kites."),
        ("Fly? Then land", "Fly? Then land."),
        ("Describe a kite. \n", "Describe a kite."),
        ("Describe a kite ", "Describe a kite."),
        ('""', '"".'),
    ],
)
def test_a_goal_ends_with_one_mark(tmp_path: Path, goal: str, prompt: str) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["goal", "target"], [goal, "Sure"]])
    assert [item.prompt for item in load_advbench(path)] == [prompt]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"goal;target\r\nFly; now;Sure\r\n", None),
        (b'goal;target\r\nFly, now;"Sure;\nyes"\r\n', ("Fly, now", "Sure;\nyes")),
        (b"\xef\xbb\xbfUnnamed: 0\tgoal\ttarget\n0\tFly\tSure\n", ("Fly", "Sure")),
        (b",goal,target\n0,Fly,Sure\n", ("Fly", "Sure")),
        (b"goal,target\rFly,Sure\r", ("Fly", "Sure")),
    ],
)
def test_csv_of_spreadsheets(tmp_path: Path, text: bytes, expected: tuple[str, str] | None) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    if expected is None:
        expect_error(("line 2", "more fields", "';'"), load_advbench, path)
    else:
        assert load_advbench(path) == [AdvBenchItem(*expected)]


@pytest.mark.parametrize("empty", ["nan", "NaN", "None", "null", "<NA>", '""', " "])
def test_a_goal_that_pandas_left_empty_is_none(tmp_path: Path, empty: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"goal,target\n{SECRET},b\n{empty},{SECRET}\n", encoding="utf-8")
    expect_error(("line 3", "'goal' is empty"), load_advbench, path)


@pytest.mark.parametrize(("load", "make"), [(load_hhh, hhh_record), (load_mt_bench, mt_record)])
def test_an_array_and_lines_are_the_same_rows(tmp_path: Path, load: Any, make: Any) -> None:
    rows = [make(question_id=81), make(question_id=82, category="stem")]
    array, lines = tmp_path / "rows.json", write(tmp_path / "rows.jsonl", *rows)
    array.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert load(array) == load(lines) and len(load(array)) == 2
    array.write_text(json.dumps([*rows, make(prompt=None, question_id=None)]), encoding="utf-8")
    expect_error(("row 3", "must be"), load, array)
    array.write_text(json.dumps(rows)[:-1] + ",\n{" + SECRET, encoding="utf-8")
    expect_error(("line 2", "not JSON", "JSON array of objects, or JSON lines"), load, array)


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"question_id": "81"}, ("'question_id'", "whole number")),
        ({"question_id": 81.5}, ("'question_id'", "whole number")),
        ({"category": float("nan")}, ("'category'",)),
        ({"turns": str([SECRET, "b"])}, ("'turns'", "no text of such a list")),
        ({"turns": [SECRET, None]}, ("'turns'",)),
    ],
)
def test_mt_bench_through_pandas(tmp_path: Path, changed: dict[str, Any], fragments: tuple[str, ...]) -> None:
    expect_error(("line 1", *fragments), load_mt_bench, write(tmp_path / "q.jsonl", mt_record(**changed)))
    sound = write(tmp_path / "q.jsonl", mt_record(question_id=81.0, reference=float("nan")))
    assert [(q.question_id, q.reference) for q in load_mt_bench(sound)] == [(81, None)]


def test_missing_advbench(tmp_path: Path) -> None:
    expect_error(("cannot be read",), load_advbench, tmp_path / "a.csv")


def test_embedded_world_in_the_same_readers(tmp_path: Path) -> None:
    world.write_advbench(tmp_path / "a.csv")
    world.write_hhh(tmp_path / "h.jsonl")
    world.write_mt_bench(tmp_path)
    assert len(load_advbench(tmp_path / "a.csv")) == 520
    items = load_hhh(tmp_path / "h.jsonl")
    assert len(items) == 438 and sum(i.correct == 0 for i in items) == 228
    questions = load_mt_bench(tmp_path)
    assert [q.question_id for q in questions] == list(range(81, 161))
    assert all(q.reference for q in questions)


def test_real_files(real_data: Path) -> None:
    assert len(load_advbench(real_data / "advbench" / "harmful_behaviors.csv")) == 520
    questions = load_mt_bench(real_data / "mt_bench")
    assert [q.question_id for q in questions] == list(range(81, 161))
    assert len({q.category for q in questions}) == 8
    assert sum(q.reference is not None for q in questions) == 39
