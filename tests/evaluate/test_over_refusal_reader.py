"""XSTest's file in its three published forms, and one error per fault that quotes no prompt."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedsim.base.errors import DataError
from fedsim.evaluate import over_refusal
from fedsim.evaluate.over_refusal import XsTestItem, load_xstest

SECRET = "hush-hush"
HEAD = "id,prompt,type,label,focus,note\n"


def put(folder: Path, text: str) -> Path:
    path = folder / "xstest.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_decide_where_there_are_any(tmp_path: Path) -> None:
    path = put(
        tmp_path, f'{HEAD}1,"How do I fly, a kite?",homonyms,safe,fly,\n2,Hide it?,contrast_homonyms,unsafe,,x\n'
    )
    assert load_xstest(path) == [
        XsTestItem("How do I fly, a kite?", "homonyms", True),
        XsTestItem("Hide it?", "contrast_homonyms", False),
    ]
    loud = put(tmp_path, f"{HEAD}1,Fly?,homonyms,Safe,,\n2,Hide?,contrast_homonyms, UNSAFE,,\n".replace(",", ";"))
    assert [item.safe for item in load_xstest(loud)] == [True, False], "from a spreadsheet"
    odd = put(tmp_path, f"{HEAD}1,Fly?,contrast_homonyms,safe,,\n2,Hide?,homonyms,unsafe,,\n")
    assert [item.safe for item in load_xstest(odd)] == [True, False]


@pytest.mark.parametrize("head", ["id,type,prompt,focus,note", "id_v1,id_v2,type,prompt,focus,note"])
def test_older_files_tell_unsafe_prompts_by_their_type(tmp_path: Path, head: str) -> None:
    ids = "1," * (head.count("id"))
    path = put(tmp_path, f"{head}\n{ids}definitions,What is a kite?,,\n{ids}contrast_definitions,Hide it?,,\n")
    assert [(item.kind, item.safe) for item in load_xstest(path)] == [
        ("definitions", True),
        ("contrast_definitions", False),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"id,prompt,label\n1,{SECRET},safe\n", "line 1: no column 'type'; XSTest's header is id,prompt,type,label"),
        (f"{HEAD}1,{SECRET},homonyms,harmless,,\n", "line 2: field 'label' must be 'safe' or 'unsafe'"),
        (f"{HEAD}1,{SECRET},homonyms\n", "line 2: field 'label' must be 'safe' or 'unsafe'"),
        (f"{HEAD}1,{SECRET},homonyms,safe,,\n2, ,homonyms,safe,,\n", "line 3: field 'prompt' is empty"),
        (f"{HEAD}1,{SECRET},,safe,,\n", "line 2: field 'type' is empty"),
        (f"{HEAD}1,{SECRET},nan,safe,,\n", "line 2: field 'type' is empty"),
        (f"{HEAD}1,NaN,homonyms,safe,,{SECRET}\n", "line 2: field 'prompt' is empty"),
        (f"{HEAD}1,{SECRET},homonyms,nan,,\n", "line 2: field 'label' must be 'safe' or 'unsafe'"),
        (f"{HEAD}1,{SECRET},{SECRET},homonyms,safe,,,\n", "line 2: more fields than the header"),
        (HEAD, "holds no rows"),
    ],
)
def test_faults(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_xstest(put(tmp_path, text))
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_a_prompt_does_not_show_in_representations() -> None:
    assert SECRET not in repr(XsTestItem(SECRET, "homonyms", True))


def test_embedded_world_in_the_same_reader(tmp_path: Path) -> None:
    over_refusal.write_xstest(tmp_path / "xstest.csv")
    items = load_xstest(tmp_path / "xstest.csv")
    assert Counter(item.safe for item in items) == {True: 250, False: 200}


def test_real_file(real_data: Path) -> None:
    """250 safe prompts of ten types and 200 unsafe ones of eight, 25 of each."""
    items = load_xstest(real_data / "xstest" / "xstest_prompts.csv")
    assert Counter(item.safe for item in items) == {True: 250, False: 200}
    types = Counter((item.kind, item.safe) for item in items)
    assert len(types) == 18 and set(types.values()) == {25}
    assert all(kind.startswith("contrast_") != safe for kind, safe in types)
