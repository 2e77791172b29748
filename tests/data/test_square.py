"""The SQuARe reader: the real file's figures, labels in every spelling, errors with the place, Arrow's round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from fedsim.base.errors import DataError
from fedsim.data.square import SquareRow, from_arrow, load_square, to_arrow


def entry(number: int = 0, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "question": f"연 {number}?",
        "question_en": f"Kite {number}?",
        "response": f"빨강 {number}",
        "response_en": f"Red {number}",
        "acceptable?": number % 2,
        "category": ["objective"],
        "question_category": "kites",
        **changes,
    }
    return {k: v for k, v in made.items() if v != "ABSENT"}


def write(path: Path, content: Any) -> Path:
    file = path / "rows.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def test_the_real_file(real_data: Path) -> None:
    path = real_data / "square" / "response_test_ood.json"
    file = load_square(path)
    assert (len(file.rows), file.num_red, file.num_acceptable, file.num_bad_labels) == (480, 265, 215, 0)
    assert len({row.prompt for row in file.rows}) == 254
    raw = json.loads(path.read_text(encoding="utf-8"))
    for row, source in zip(file.rows, raw, strict=True):
        assert (row.prompt, row.response) == (source["question_en"], source["response_en"])
        assert row.red == (source["acceptable?"] == 0) and list(row.categories) == source["category"]
    korean = load_square(path, "ko")
    assert [r.prompt for r in korean.rows] == [s["question"] for s in raw]


@pytest.mark.parametrize(
    ("label", "red"), [(0, True), (1, False), ("0", True), ("1", False), (False, True), (True, False), (1.0, False),
     ("1.0", False), ("0.0", True), ("TRUE", False), ("False", True), (" true ", False), (0.0, True)],
)  # fmt: skip
def test_labels_in_every_spelling(tmp_path: Path, label: object, red: bool) -> None:
    file = load_square(write(tmp_path, [entry(**{"acceptable?": label})]))
    assert file.num_bad_labels == 0 and [r.red for r in file.rows] == [red]


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "01", "1,0", "", None, [], [0], {}, "ABSENT", float("nan")])
def test_other_labels_are_dropped_and_counted(tmp_path: Path, label: object) -> None:
    file = load_square(write(tmp_path, [entry(0), entry(1, **{"acceptable?": label}), entry(2)]))
    assert file.num_bad_labels == 1
    assert [r.row_id for r in file.rows] == [0, 2], "a row keeps its place in the file"


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u3000"])
def test_blank_questions_are_dropped_and_counted(tmp_path: Path, blank: str) -> None:
    """A blank response stays: CAI takes the question alone, and training counts the row itself."""
    content = [
        entry(0, question_en=blank),
        entry(1, response_en=blank),
        entry(2, question_en=blank, **{"acceptable?": 7}),
        entry(3),
    ]
    file = load_square(write(tmp_path, content))
    assert (file.num_blank_questions, file.num_bad_labels) == (1, 1)
    assert [row.row_id for row in file.rows] == [1, 3]
    with pytest.raises(DataError, match=r"question of every labelled row is blank \(field 'question_en'\).*language"):
        load_square(write(tmp_path, content[:1]))


def test_only_bad_labels_is_an_error(tmp_path: Path) -> None:
    for content in ([], [entry(**{"acceptable?": 3})]):
        with pytest.raises(DataError, match="no row labelled 0 or 1"):
            load_square(write(tmp_path, content))


def test_korean_only_files_say_what_to_do(tmp_path: Path) -> None:
    content = [entry(i, question_en="ABSENT", response_en="ABSENT") for i in range(3)]
    with pytest.raises(DataError, match=r"row 1: has no English text \(question_en\).*data\.language=ko"):
        load_square(write(tmp_path, content))
    assert load_square(write(tmp_path, content), "ko").rows[2].prompt == "연 2?"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2", ["line 1", "not JSON", "must be a JSON array of objects, or JSON lines"]),
        ('[\n{"a": 1},\n{"b": }\n]', ["line 3", "not JSON"]),
        ({"rows": []}, ["must be a JSON array", "one object and no row with 'acceptable?'", "orient='records'"]),
        ({"question": {"0": "q"}, "response": {"0": "a"}}, ["one object and no row with 'acceptable?'"]),
        ([entry(0), "text"], ["row 2", "must be a JSON object", "str"]),
        ([entry(0), entry(1, response_en=None)], ["row 2", "'response_en'", "NoneType"]),
        ([entry(0, question_en=7)], ["row 1", "'question_en'", "int"]),
        ([entry(0, category=5)], ["row 1", "'category'", "it is int"]),
        ([entry(0, category=["a", 1])], ["row 1", "'category'", "list holds int"]),
        ([entry(0, category=["a", ["b"]])], ["row 1", "'category'", "list holds list"]),
        ([entry(0, category=["['a']"])], ["row 1", "'category'", "list as text"]),
        ([entry(0, category={"a": 1})], ["row 1", "'category'", "it is dict"]),
        ([entry(0, category=1.5)], ["row 1", "'category'", "it is float"]),
        ([entry(0, category="a, b")], ["row 1", "'category'", "',' may be one or several: write a list"]),
        ([entry(0, category="a;b")], ["row 1", "'category'", "';' may be one or several"]),
        ([entry(0, category="a|b")], ["row 1", "'category'", "'|' may be one or several"]),
        ([entry(0, category="['a' 'b']")], ["row 1", "'category'", "begins like a list"]),  # numpy's
        ([entry(0, category="[a, b]")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category="['a', 1]")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category="['a'")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category='["\\ud800"]')], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category="{'a': 'b'}")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category="('a')")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, category="[__import__('os').getcwd()]")], ["row 1", "'category'", "begins like a list"]),
        ([entry(0, question_category=3)], ["row 1", "'question_category'", "it is int"]),
        ([entry(0, response_en=float("nan"))], ["row 1", "'response_en'", "NoneType"]),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        load_square(path)
    assert not [w for w in [str(path), *words] if w not in str(caught.value)], str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: cannot be read"):
        load_square(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="not UTF-8"):
        load_square(tmp_path / "latin.json")


def test_categories_and_question_category_may_be_missing(tmp_path: Path) -> None:
    content = [entry(0, category="ABSENT", question_category=None), entry(1, category="objective")]
    rows = load_square(write(tmp_path, content)).rows
    assert rows[0].categories == () and rows[0].question_category == ""
    assert rows[1].categories == ("objective",)


@pytest.mark.parametrize(
    ("value", "categories"),
    [
        (None, ()), (float("nan"), ()), ("", ()), (" ", ()), ("nan", ()), ("NaN", ()), ("None", ()), ("null", ()),
        ("<NA>", ()), ([], ()), ([None], ()), (["", "nan"], ()), ("[]", ()), ("()", ()), ("ABSENT", ()),
        ("a", ("a",)), (" a b ", ("a b",)), (["a", "b"], ("a", "b")), (["a", None], ("a",)), (["a, b"], ("a, b",)),
        ("['a']", ("a",)), ("['a', 'b']", ("a", "b")), ('["a", "b"]', ("a", "b")), ("('a', 'b')", ("a", "b")),
        (" [ 'a' , \"it's\", ] ", ("a", "it's")), ("['a, b']", ("a, b",)), ("['']", ()), ("['a', 'nan']", ("a",)),
        ("['\\u00e9']", ("\u00e9",)),
    ],
)  # fmt: skip
def test_categories_that_went_through_a_table(tmp_path: Path, value: object, categories: tuple[str, ...]) -> None:
    file = load_square(write(tmp_path, [entry(category=value, question_category=value)]))
    assert file.rows[0].categories == categories
    assert file.rows[0].question_category == ", ".join(categories)


def test_a_question_category_is_one_text(tmp_path: Path) -> None:
    rows = load_square(write(tmp_path, [entry(question_category="kites, boats")])).rows
    assert rows[0].question_category == "kites, boats"


def test_an_array_and_lines_are_the_same_rows(tmp_path: Path) -> None:
    content = [entry(i, category=["a"] * (i % 2)) for i in range(4)]
    array = load_square(write(tmp_path, content))
    lines = load_square(write(tmp_path, "\r\n\n".join(json.dumps(row) for row in content)))
    assert lines == array and [row.row_id for row in lines.rows] == [0, 1, 2, 3]
    frame = pandas.DataFrame([{**row, "category": str(row["category"])} for row in content])
    frame.loc[1, "question_category"] = None
    path = tmp_path / "frame.jsonl"
    frame.to_json(path, orient="records", lines=True)
    found = load_square(path)
    assert [r.categories for r in found.rows] == [r.categories for r in array.rows]
    assert [r.question_category for r in found.rows] == ["kites", "", "kites", "kites"]
    frame.to_json(path)
    with pytest.raises(DataError, match="is one object and no row"):
        load_square(path)


def test_arrow_round_trip(tmp_path: Path) -> None:
    """3,000 rows of which only the last have a category: a column's type may not be guessed from the first ones."""
    rows = [
        SquareRow(i * 2, f"Kite {i}? é\u2028", "" if i % 7 else "Red\n", i % 3 == 0, ("a", "b") if i > 2500 else (), "")
        for i in range(3000)
    ]
    path = tmp_path / "rows.arrow"
    to_arrow(rows, path)
    table = from_arrow(path)
    assert len(table) == 3000
    assert table.take(list(range(3000))) == rows
    assert table.take([2999, 0, 0]) == [rows[2999], rows[0], rows[0]]
    assert table.take([]) == []
    assert table._table.cache_files == [{"filename": str(path)}], "mapped, not read"
