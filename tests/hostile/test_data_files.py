"""Data files of every kind with any content: rows that can be used, or one error that names file and line or field."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.data.evaluation_sets import load_advbench, load_hhh, load_mt_bench
from fedsim.data.helpful import load_helpful
from fedsim.data.square import from_arrow, load_square, to_arrow
from fedsim.evaluate.fastchat import JudgmentFile, judgment_row, read_answers
from fedsim.evaluate.judge_prompts import FIELDS, load_judge_prompts, make_matches
from fedsim.evaluate.over_refusal import load_xstest
from fedsim.safety.cai_data import load_conversations
from fedsim.safety.constitution import load_constitution
from fedsim.world.client_rows import square_rows
from tests.hostile.conftest import as_json, cases, damaged, misshapen, result

OPTIONS = "Pick.\n\nOptions:\n (A) [[[Kites.]]]\n (B) [[[Boats.]]]\n\nThe answer is:"
TALK = "\n\nHuman: Pick.\n\nAssistant: "
TURNS: dict[str, str] = {"init_prompt": "Why?", "init_response": "So."}
CAI = {
    **TURNS,
    "critic_prompt": "And?",
    "critic_response": "No.",
    "revision_prompt": "Then?",
    "revision_response": "Yes.",
    "chosen": "Yes.",
    "rejected": "So.",
    "row_id": 0,
    "principle": 0,
    "truncated": [],
}

#: Rows of each JSON format, small and harmless.
ROWS: dict[str, Any] = {
    "square": [{k: v for k, v in row.items() if k != "id"} for row in square_rows()[:3]],
    "constitution": {
        "constitutions": [{"critic": "Is it kind?", "revision": "Make it kind."}],
        "system_chat": [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi!"}]],
    },
    "hhh": [
        {
            "prompt": OPTIONS,
            "corrects": [" (A)"],
            "incorrects": [" (B)"],
            "text_correct": f"{TALK}Kites.",
            "text_incorrect": f"{TALK}Boats.",
        }
    ],
    "mt_bench": [
        {"question_id": 81 + i, "category": "stem", "turns": ["Ask?", "Again?"], "reference": ["A.", "B."]}
        for i in range(2)
    ],
    "answers": [{"question_id": 81, "choices": [{"index": 0, "turns": ["It is.", "Yes."]}]}],
    "judge_prompts": [
        {
            "name": name,
            "system_prompt": "Be fair.",
            "prompt_template": " ".join(f"{{{field}}}" for field in sorted(fields)),
            "output_format": "[[rating]]",
        }
        for name, fields in FIELDS.items()
    ],
    "helpful": [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]} for _ in "ab"
    ],
    "conversations": [CAI],
}
#: Read as one JSON value; rows of the others stand one in each line, or in an array (:func:`in_other_form`).
WHOLE_FILES = ("square", "constitution")
CSV = {
    "advbench": b'goal,target\n"Paint, a kite",Sure\nFly it,"Sure, ""so"""\n',
    "xstest": b'id,prompt,type,label,focus,note\n1,"Fly, it?",homonyms,safe,,\n2,Paint?,contrast_homonyms,unsafe,,\n',
}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "square": load_square,
    "constitution": load_constitution,
    "hhh": load_hhh,
    "mt_bench": load_mt_bench,
    "answers": read_answers,
    "judge_prompts": load_judge_prompts,
    "helpful": load_helpful,
    "conversations": load_conversations,
    "advbench": load_advbench,
    "xstest": load_xstest,
}


def texts(value: Any) -> list[str]:
    """Every text in what a loader gives."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    if isinstance(value, Sequence):
        return [text for part in value for text in texts(part)]
    return texts(vars(value)) if hasattr(value, "__dict__") else []


def load(name: str, folder: Path, data: bytes) -> Any:
    """What the reader makes of the file; its texts can be written to a file and tokenised."""
    path = folder / f"{name}.data"
    path.write_bytes(data)
    found = result(lambda: LOADERS[name](path), str(path))
    "\n".join(texts(found)).encode()
    if name == "square" and found is not None:
        to_arrow(found.rows, folder / "rows.arrow")
        assert from_arrow(folder / "rows.arrow").take(list(range(len(found.rows)))) == found.rows
    if name == "judge_prompts" and found is not None:
        (question, *_) = load_mt_bench(write(folder, "mt_bench"))
        references = {question.question_id: ("A.", "B.")}
        assert len(make_matches(found, [(question, ("{0}", "{x}"))], references)) == 2
    return found


def encode(name: str, value: Any) -> bytes:
    if name in WHOLE_FILES:
        return as_json(value)
    return b"".join(as_json(row) + b"\n" for row in value)


def write(folder: Path, name: str) -> Path:
    path = folder / f"{name}.whole"
    path.write_bytes(encode(name, ROWS[name]))
    return path


@pytest.mark.parametrize("name", LOADERS)
def test_the_whole_files_are_read(tmp_path: Path, name: str) -> None:
    data = CSV.get(name) or encode(name, ROWS[name])
    assert load(name, tmp_path, data)
    if name != "conversations":  # fedsim's own
        assert texts(load(name, tmp_path, b"\xef\xbb\xbf" + data)) == texts(load(name, tmp_path, data)), "with a BOM"


def in_other_form(name: str) -> bytes:
    """The whole file with its rows in the other form: lines for an array, an array for lines."""
    if name in CSV:
        return CSV[name].replace(b",", b";")
    if name == "square":
        return b"\r\n".join(as_json(row) for row in ROWS[name])
    return as_json(ROWS[name])


@pytest.mark.parametrize("name", sorted(set(LOADERS) - {"constitution", "conversations"}))
def test_both_forms_are_the_same_rows(tmp_path: Path, name: str) -> None:
    data = CSV.get(name) or encode(name, ROWS[name])
    found = load(name, tmp_path, in_other_form(name))
    assert len(texts(found)) == len(texts(load(name, tmp_path, data))) > 0
    assert name in CSV or texts(found) == texts(load(name, tmp_path, data))


@cases(350)
@given(name=st.sampled_from(sorted(LOADERS)), other=st.booleans(), data=st.data())
def test_a_damaged_file(tmp_path: Path, name: str, other: bool, data: st.DataObject) -> None:
    whole = in_other_form(name) if other else CSV.get(name) or encode(name, ROWS[name])
    load(name, tmp_path, data.draw(damaged(whole)))


LISTS = st.lists(st.sampled_from(["'", '"', "[", "]", "(", ")", ",", " ", "a", "nan", "\\", "\\ud800", "\n", "1"]))


@cases(150)
@given(text=LISTS.map("".join))
def test_any_text_as_a_category(tmp_path: Path, text: str) -> None:
    """Categories without a bracket at their beginning, or the one error."""
    found = load("square", tmp_path, as_json([{**ROWS["square"][0], "category": text}]))
    assert found is None or not any(c.startswith(("[", "(")) or c == "nan" for c in found.rows[0].categories)


@cases(350)
@given(name=st.sampled_from(sorted(ROWS)), data=st.data())
def test_a_file_of_another_shape(tmp_path: Path, name: str, data: st.DataObject) -> None:
    rows = data.draw(misshapen(ROWS[name]))
    if name not in WHOLE_FILES and not isinstance(rows, list):
        rows = [rows]
    load(name, tmp_path, encode(name, json.loads(json.dumps(rows, default=str))))


@cases(60)
@given(cells=st.lists(st.lists(st.text(max_size=12), max_size=7), max_size=4), name=st.sampled_from(sorted(CSV)))
def test_any_rows_of_a_csv_file(tmp_path: Path, name: str, cells: list[list[str]]) -> None:
    lines = "\n".join(",".join(row) for row in cells)
    load(name, tmp_path, CSV[name] + lines.encode("utf-8", "surrogatepass"))


JUDGMENT = judgment_row(81, "kite", ("judge", "single-v1"), "Rate.", "Rating: [[5]]", 5, 1, 1.0)


@cases(60)
@given(data=st.data())
def test_judgments(tmp_path: Path, data: st.DataObject) -> None:
    """A torn last line is what a crash leaves: it is left out. Nothing else is."""
    file = JudgmentFile(tmp_path, "judge")
    file.path.parent.mkdir(exist_ok=True)
    whole = as_json(JUDGMENT) + b"\n"
    file.path.write_bytes(whole + data.draw(damaged(whole)))
    found = result(file.rows, str(file.path))
    assert found is None or found[:1] == [JUDGMENT] or len(found) <= 1
    if found is not None:
        file.append(JUDGMENT)
        assert file.rows() == [*found, JUDGMENT]


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot be read"):
            LOADERS[name](path)


@pytest.mark.parametrize(
    "template", ["{question:9999999999}", "{answer!x}", "{answer:d}", "{question.__class__}", "{0}", "{}", "{question"]
)
def test_a_template_with_a_form_of_its_own_is_refused(tmp_path: Path, template: str) -> None:
    rows = [{**row, "prompt_template": template} for row in ROWS["judge_prompts"]]
    with pytest.raises(DataError, match=r"judge_prompts[.]data, line 1: "):
        path = tmp_path / "judge_prompts.data"
        path.write_bytes(encode("judge_prompts", rows))
        load_judge_prompts(path)
