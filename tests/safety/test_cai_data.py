"""Three-turn generation, usable rows, and the JSONL format of PROTOCOLS."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fedsim.base import keyed_random
from fedsim.base.errors import DataError
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.data.square import SquareRow
from fedsim.generate.engine import Engine, Reply, Sampling
from fedsim.safety.cai_data import (
    CaiRow,
    count_metrics,
    generate_conversations,
    load_conversations,
    save_conversations,
    usable,
)
from fedsim.safety.constitution import Constitution, Principle

RULES = Constitution(
    tuple(Principle(f"critic {i}", f"revise {i}") for i in range(3)), (user_turn("example"), assistant_turn("reply"))
)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=12)
KEYS = {
    "init_prompt",
    "init_response",
    "critic_prompt",
    "critic_response",
    "revision_prompt",
    "revision_response",
    "chosen",
    "rejected",
    "principle",
}


class TableEngine:
    """Answers each call with the call's name and the row's number; remembers what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.calls: list[tuple[list[Conversation], Sampling, tuple[keyed_random.KeyPart, ...]]] = []

    def converse(
        self,
        conversations: Sequence[Conversation],
        follow_ups: Sequence[Sequence[str]],
        sampling: Sampling,
        turn_keys: Sequence[Sequence[keyed_random.KeyPart]],
    ) -> list[list[Reply]]:
        turns: list[list[Reply]] = []
        for turn, key in enumerate(turn_keys):
            if turn:
                conversations = [
                    [*chat, assistant_turn(reply.text), user_turn(text)]
                    for chat, reply, text in zip(conversations, turns[-1], follow_ups[turn - 1], strict=True)
                ]
            self.calls.append((list(conversations), sampling, tuple(key)))
            turns.append([self.reply(str(key[-1]), i) for i in range(len(conversations))])
        return turns

    def reply(self, turn: str, row: int) -> Reply:
        return Reply(f"{turn} {row}", 3, truncated=False)


def make(engine: Any, rows: Sequence[SquareRow], **options: Any) -> list[CaiRow]:
    return generate_conversations(engine, rows, RULES, SAMPLING, **options)


def row(**changes: Any) -> CaiRow:
    base = CaiRow(0, "prompt", "response", "critic", "critique", "revise", "revision", principle=1)
    return replace(base, **changes)


def test_three_turns_in_one_chat(rows: list[SquareRow]) -> None:
    engine = TableEngine()
    made = make(engine, rows)
    assert [key for _, _, key in engine.calls] == [("cai", "response"), ("cai", "critique"), ("cai", "revision")]
    assert all(sampling == SAMPLING for _, sampling, _ in engine.calls)
    for i, (data, cai) in enumerate(zip(rows, made, strict=True)):
        rule = RULES.principles[cai.principle]
        first = [*RULES.system_chat, user_turn(data.prompt)]
        second = [*first, assistant_turn(f"response {i}"), user_turn(rule.critic)]
        third = [*second, assistant_turn(f"critique {i}"), user_turn(rule.revision)]
        assert [chats[i] for chats, _, _ in engine.calls] == [first, second, third]
        assert (cai.row_id, cai.init_prompt) == (data.row_id, data.prompt)
        assert (cai.critic_prompt, cai.revision_prompt) == (rule.critic, rule.revision), "one principle for both"
        assert (cai.chosen, cai.rejected) == (f"revision {i}", f"response {i}")
        assert cai.critic_response == f"critique {i}" and cai.truncated == () and cai.defect is None


def test_first_turn_of_the_data_set(rows: list[SquareRow]) -> None:
    engine = TableEngine()
    made = make(engine, rows, first_turn="dataset")
    assert [key[-1] for _, _, key in engine.calls] == ["critique", "revision"]
    assert [cai.rejected for cai in made] == [data.response for data in rows]
    assert engine.calls[0][0][0][-2] == assistant_turn(rows[0].response)


def test_principles_are_drawn_per_row(make_row: Callable[..., SquareRow]) -> None:
    rows = [make_row(i, response="x") for i in range(900)]
    drawn = [cai.principle for cai in make(TableEngine(), rows)]
    assert [cai.principle for cai in make(TableEngine(), rows[::-1])] == drawn[::-1], "the order changes nothing"
    assert all(240 < count < 360 for count in Counter(drawn).values()), "uniform over 3 principles, 4 sigma"
    assert [cai.principle for cai in make(TableEngine(seed=1), rows)] != drawn
    assert [cai.principle for cai in make(TableEngine(), rows, key=("cai", 7))] != drawn


class ScatteredRanks(OneRank):
    """Computes the units last first, as other ranks would."""

    def map(self, compute: Callable[[Any], Any], units: Sequence[Any], *_: object) -> list[Any]:
        done = {i: compute(units[i]) for i in reversed(range(len(units)))}
        return [done[i] for i in range(len(units))]


def test_real_engine_gives_the_same_rows_wherever_units_are_computed(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    made = [
        make(Engine(guard_model, llama_chat, ranks, batch_size=4, max_context=1024, seed=2), rows)
        for ranks in (OneRank(), ScatteredRanks())
    ]
    assert made[0] == made[1]
    assert len({cai.init_response for cai in made[0]}) > 1
    assert all(set(cai.truncated) <= {"response", "critique", "revision"} for cai in made[0])
    assert any(cai.truncated for cai in made[0]), "a random model seldom ends within 12 tokens"


def test_truncated_turns_are_named(rows: list[SquareRow]) -> None:
    class Cutting(TableEngine):
        """Critiques do not end, and the last turn's conversation outgrows the context."""

        def reply(self, turn: str, row: int) -> Reply:
            ends = {"critique": (True, False), "revision": (False, True)}.get(turn, (False, False))
            return Reply(turn, 3, *ends)

    made = make(Cutting(), rows)
    assert all(cai.truncated == ("critique", "revision") for cai in made)


@pytest.mark.parametrize(
    ("changes", "defect"),
    [
        ({}, None),
        ({"init_response": " \n"}, "empty_response"),
        ({"revision_response": ""}, "empty_revision"),
        ({"revision_response": "response\n"}, "unchanged"),
        ({"revision_response": "Response"}, None),
        ({"truncated": ("response",)}, "truncated"),
        ({"truncated": ("critique", "revision")}, "truncated"),
        ({"truncated": ("critique",)}, None),
        ({"critic_response": ""}, None),
        ({"init_response": "", "revision_response": ""}, "empty_response"),
    ],
)
def test_defects(changes: dict[str, Any], defect: str | None) -> None:
    assert row(**changes).defect == defect
    assert usable([row(**changes)]) == ([] if defect else [row()] if not changes else [row(**changes)])


def test_counts_by_reason_add_up() -> None:
    rows = [
        row(),
        row(init_response="", revision_response=""),
        row(revision_response=""),
        row(revision_response="response"),
        row(revision_response="response", truncated=("response", "revision")),
        row(truncated=("critique", "revision")),
    ]
    counts = count_metrics(rows)
    assert counts == {
        "cai/num_rows": 6,
        "cai/num_dropped_empty_response": 1,
        "cai/num_dropped_empty_revision": 1,
        "cai/num_dropped_unchanged": 2,
        "cai/num_dropped_truncated": 1,
        "cai/num_empty_revisions": 2,
        "cai/num_unchanged_revisions": 2,
        "cai/num_truncated_response": 1,
        "cai/num_truncated_critique": 1,
        "cai/num_truncated_revision": 2,
    }
    dropped = sum(count for name, count in counts.items() if name.startswith("cai/num_dropped_"))
    assert dropped == len(rows) - len(usable(rows))


def test_file_round_trip_and_keys(tmp_path: Path) -> None:
    rows = [row(), row(row_id=5, init_prompt='a\nb\u2028c "d" 연', truncated=("critique",))]
    path = tmp_path / "cai.jsonl"
    save_conversations(rows, path)
    assert load_conversations(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["cai.jsonl"], "no partial file is left"
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert all(set(entry) == KEYS | {"row_id", "truncated"} for entry in entries)
    save_conversations([], path)
    assert load_conversations(path) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cai.jsonl"
    save_conversations([row()], path)
    with pytest.raises(UnicodeEncodeError):
        save_conversations([row(row_id=9), row(init_prompt="\ud800")], path)
    assert load_conversations(path) == [row()]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.pop("critic_prompt"), "line 2: 'critic_prompt' must be text"),
        (lambda e: e.update(principle="x"), "line 2: 'principle' must be a whole number"),
        (lambda e: e.update(chosen="else"), "line 2: 'chosen' must equal 'revision_response'"),
        (lambda e: e.update(truncated=["end"]), "line 2: 'truncated' must be a list of response, critique, revision"),
    ],
)
def test_malformed_line(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = tmp_path / "cai.jsonl"
    save_conversations([row(), row()], path)
    first, second = path.read_text(encoding="utf-8").splitlines()
    entry = json.loads(second)
    edit(entry)
    path.write_text(f"{first}\n{json.dumps(entry)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_conversations(path)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_conversations(tmp_path / "absent.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"row_id": 1', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: is not valid JSON"):
        load_conversations(tmp_path / "cut.jsonl")
