"""Shipped constitutions load; malformed files name the place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from fedsim.base.errors import DataError
from fedsim.safety.constitution import load_constitution
from fedsim.world.conversations import PRINCIPLES

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs" / "constitution"
DATA = Path(os.environ.get("FEDSIM_TEST_DATA", ROOT.parent / "shared" / "data"))
GOOD = {"critic": "Find the harm.", "revision": "Remove it."}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_responsible_covers_square_s_red_categories() -> None:
    constitution = load_constitution(SHIPPED / "responsible.json")
    assert 6 <= len(constitution.principles) <= 9 and constitution.system_chat == ()
    rule = constitution.principles[0]
    for word in ("contentious", "unethical", "predictive"):
        assert word in rule.critic and word in rule.revision
    assert len(set(constitution.principles)) == len(constitution.principles)


def test_tiny_uses_the_wording_that_the_embedded_model_knows() -> None:
    constitution = load_constitution(SHIPPED / "tiny.json")
    assert tuple((p.critic, p.revision) for p in constitution.principles) == PRINCIPLES


def test_published_constitution_loads() -> None:
    path = DATA / "constitution" / "llmswarm_constitution_anthropic.json"
    if not path.exists():
        pytest.skip(f"{path} is absent; set FEDSIM_TEST_DATA")
    constitution = load_constitution(path)
    assert len(constitution.principles) == 16
    assert [m["role"] for m in constitution.system_chat] == ["user", "assistant"] * 12


def test_example_dialogues_precede_every_conversation(tmp_path: Path) -> None:
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "c.json", {"constitutions": [GOOD], "system_chat": [example, example]})
    messages = load_constitution(path).conversation([{"role": "user", "content": "now"}])
    assert [m["content"] for m in messages] == ["a", "b", "a", "b", "now"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be one JSON object with a list 'constitutions'"),
        ({"constitutions": {}}, "must be one JSON object with a list 'constitutions'"),
        ({"constitutions": []}, "'constitutions' is empty"),
        ({"constitutions": [GOOD, "x"]}, r"constitutions\[1\]: must be an object"),
        ({"constitutions": [{"critic": "a"}]}, r"constitutions\[0\]: 'revision' must be a non-empty text"),
        ({"constitutions": [{"critic": " ", "revision": "b"}]}, r"constitutions\[0\]: 'critic' must be a non-empty"),
        ({"constitutions": [GOOD], "system_chat": "x"}, "'system_chat' must be a list of example dialogues"),
        ({"constitutions": [GOOD], "system_chat": [{"role": "user", "content": "a"}]}, r"system_chat\[0\]: must be a"),
        ({"constitutions": [GOOD], "system_chat": [[{"role": "user", "content": "a"}]]}, r"system_chat\[0\]: must be"),
        (
            {"constitutions": [GOOD], "system_chat": [[{"role": "user", "content": "a"}] * 2]},
            r"system_chat\[0\]\[1\]: must be \{'role': 'assistant'",
        ),
    ],
)
def test_malformed_file(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_constitution(path)
    assert str(path) in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_constitution(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{\n"constitutions": [', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: not JSON .*; must be one JSON object with a list 'constitutions'"):
        load_constitution(tmp_path / "broken.json")
    (tmp_path / "latin.json").write_bytes(b'{"constitutions": "\xe9"}')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        load_constitution(tmp_path / "latin.json")


def test_pairs_one_a_line_or_compressed_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lines.jsonl, line 2: not JSON .*; must be one JSON object with a list"):
        load_constitution(path)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"is compressed by gzip, and must be one JSON object .*; unpack it"):
        load_constitution(path)
