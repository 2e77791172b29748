"""Held-out conversations: roles in turn, and one error per fault that quotes no message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim import world
from fedsim.base.errors import DataError
from fedsim.data.chat import assistant_turn, user_turn
from fedsim.data.helpful import load_helpful

SECRET = "hush-hush"


def put(folder: Path, *records: Any) -> Path:
    path = folder / "helpful.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return path


def talk(*roles: str, **changed: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{SECRET} {i}", **changed} for i, role in enumerate(roles)]}


def test_conversations_in_order(tmp_path: Path) -> None:
    path = put(tmp_path, talk("user", "assistant") | {"id": 7}, talk("system", *["user", "assistant"] * 2))
    first, second = load_helpful(path)
    assert first == [user_turn(f"{SECRET} 0"), assistant_turn(f"{SECRET} 1")]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": SECRET}, "field 'messages' must be a list of objects"),
        ({"messages": [SECRET]}, "field 'messages' must be a list of objects"),
        ({"messages": []}, "field 'messages' must hold an optional 'system' message"),
        (talk("user"), "'assistant' last"),
        (talk("system"), "'assistant' last"),
        (talk("user", "assistant", "user"), "'assistant' last"),
        (talk("assistant", "user"), "in turn"),
        (talk("user", "user", "assistant"), "in turn"),
        (talk("user", "system", "user", "assistant"), "in turn"),
        (talk("human", "gpt"), "in turn"),
        (talk("user", "assistant", content=" "), r"field 'messages\[0\]\.content' must be text that is not empty"),
        (talk("user", "assistant", content=[SECRET]), r"field 'messages\[0\]\.content' must be text"),
    ],
)
def test_faults(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"helpful\.jsonl, line 2: .*{message}") as caught:
        load_helpful(put(tmp_path, talk("user", "assistant"), record))
    assert SECRET not in str(caught.value)


def test_embedded_world_in_the_same_reader(tmp_path: Path) -> None:
    world.write_helpful(tmp_path / "helpful.jsonl")
    assert [len(c) for c in load_helpful(tmp_path / "helpful.jsonl")] == [2, 4] * 100
