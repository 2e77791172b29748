"""Tokenising a suite over the ranks: the same rows as alone, and nothing left to tokenise in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fedsim import world
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, as_key
from fedsim.evaluate import over_refusal
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.hhh import Hhh
from fedsim.evaluate.mt_bench import MtBench
from fedsim.evaluate.over_refusal import OverRefusal
from fedsim.evaluate.scoring import reply_row
from fedsim.evaluate.suite import Part, Suite
from fedsim.evaluate.tokens import requests, tokenise
from fedsim.model.load import EMBEDDED, load_chat


class TwoRanks(OneRank):
    """This rank and another, which computes everything."""

    size = 2


@dataclass
class FakeEngine:
    chat: ChatFormat
    ranks: OneRank
    max_context: int = 60


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    world.write_advbench(folder / "a.csv")
    world.write_hhh(folder / "h.jsonl")
    world.write_mt_bench(folder)
    over_refusal.write_xstest(folder / "x.csv")
    files = ((AdvBench(), "a.csv"), (Hhh(), "h.jsonl"), (MtBench(), "question.jsonl"), (OverRefusal(), "x.csv"))
    return Suite([Part(benchmark, benchmark.load(folder / name)) for benchmark, name in files], limit=20)


def rows(engine: FakeEngine, suite: Suite) -> list[Any]:
    """What evaluations ask of the chat format, as plain numbers."""
    found: list[Any] = []
    for conversation, replies in requests(suite):
        found.append(engine.chat.prompt_ids(conversation))
        for reply in replies:
            row = reply_row(engine.chat, conversation, reply, engine.max_context)
            found.append((row.input_ids.tolist(), row.loss_mask.tolist(), row.truncated))
    return found


def test_nothing_is_left_to_tokenise_and_the_rows_are_the_same(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = load_chat(EMBEDDED, "model.path")
    shared = FakeEngine(chat, TwoRanks())

    def elsewhere(compute: Any, units: Any) -> Any:
        found = [compute(unit) for unit in units]
        chat._remembered.clear()  # the other rank's memory is not this one's
        return found

    want = rows(FakeEngine(load_chat(EMBEDDED, "model.path"), OneRank()), suite)
    shared_prompts = 1  # of two benchmarks, which stands once
    assert len(want) == 20 * (3 + 3 + 3) + 3 * 20 - shared_prompts and any(row[-1] is True for row in want)
    monkeypatch.setattr(shared.ranks, "map", elsewhere)
    tokenise(shared, suite)  # type: ignore[arg-type]
    monkeypatch.setattr(shared.chat, "encode", lambda text: pytest.fail("tokenised again"))
    assert rows(shared, suite) == want


def test_the_memory_holds_the_suite_and_no_more(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank too; evaluations, CAI and training add nothing to it."""
    engine = FakeEngine(load_chat(EMBEDDED, "model.path"), OneRank())
    tokenise(engine, suite)  # type: ignore[arg-type]
    asked = requests(suite)
    prompts = {as_key(conversation) for conversation, _ in asked}
    scored = {(as_key(conversation), reply) for conversation, replies in asked for reply in replies}
    assert len(engine.chat._remembered) == len(prompts) + len(scored)
    monkeypatch.setattr(engine.chat, "encode", lambda text: pytest.fail("tokenised again"))
    rows(engine, suite)
    assert len(engine.chat._remembered) == len(prompts) + len(scored)
