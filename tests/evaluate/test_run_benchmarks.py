"""What a configuration asks for is read, and replies to attacks are written only where that is asked for."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim import world
from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import DataError
from fedsim.base.ranks import OneRank
from fedsim.config import EvalConfig
from fedsim.data.chat import ChatFormat
from fedsim.evaluate import over_refusal
from fedsim.evaluate.suite import evaluate
from fedsim.record.outcomes import read_items
from fedsim.run.benchmarks import load_suite, write_outcomes, write_texts

LEFT_OUT = {"advbench": "", "hhh": "", "mt_bench": "", "xstest": "", "helpful": ""}


@pytest.fixture()
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "artefacts", OneRank(), lambda text: None)


def test_the_embedded_world_brings_its_own_judges(store: ArtefactStore) -> None:
    suite, files = load_suite(EvalConfig(), store)
    assert {name: path.name for name, path in files.items()} == {
        "advbench": "advbench.csv",
        "hhh": "hhh.jsonl",
        "mt_bench": "question.jsonl",
        "xstest": "xstest.csv",
        "helpful": "helpful.jsonl",
    }
    assert [len(part.items) for part in suite.parts] == [520, 438, 80, 450, 200] and suite.guard is None
    assert suite.counts() == {"AdvBench": 520, "HHH": 438, "MT-Bench": 80, "XSTest": 450, "helpful conversations": 200}
    assert [part.benchmark.depends() for part in suite.parts] == [
        {"judge": True}, {}, {"rubric": True}, {"refuses": True}, {}
    ]  # fmt: skip
    judged, _ = load_suite(EvalConfig(), store, judged=True)
    assert judged.parts[2].benchmark.depends() == {"rubric": False}, "a judge takes the rubric's place"


def test_files_of_a_user_have_no_grammar(store: ArtefactStore, tmp_path: Path) -> None:
    over_refusal.write_xstest(tmp_path / "x.csv")
    world.write_helpful(tmp_path / "h.jsonl")
    settings = EvalConfig(**{**LEFT_OUT, "xstest": str(tmp_path / "x.csv"), "helpful": str(tmp_path / "h.jsonl")})
    suite, files = load_suite(settings, store)
    assert set(files) == {"xstest", "helpful"} and suite.parts[0].benchmark.depends() == {"refuses": False}
    assert [len(part.items) for part in suite.parts] == [450, 200]
    nothing, none = load_suite(EvalConfig(**LEFT_OUT), store)
    assert not none and not nothing.parts
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read"):
        load_suite(EvalConfig(**{**LEFT_OUT, "xstest": str(tmp_path / "nowhere.csv")}), store)


def test_replies_to_attacks_are_written_where_texts_are_asked_for(
    store: ArtefactStore, tmp_path: Path, chat: ChatFormat, stub_engine: type
) -> None:
    suite, _ = load_suite(EvalConfig(**{**LEFT_OUT, "advbench": "embedded", "xstest": "embedded"}, limit=3), store)
    found = evaluate(stub_engine(chat, reply=lambda talk: f"hush {len(talk[0]['content'])}"), suite, ("eval",))
    write_texts(found, suite, tmp_path / "off", "run-round1-global", attacks=False)
    assert not (tmp_path / "off").exists()
    write_texts(found, suite, tmp_path / "on", "run-round1-global", attacks=True)
    for part in suite.parts:
        name = part.benchmark.name
        result = found.results[name]
        records = json.loads((tmp_path / "on" / f"{name}-run-round1-global.json").read_text(encoding="utf-8"))
        assert [record["reply"] for record in records] == [reply.text for reply in result.replies]
        # The stub tells the length of what it was asked.
        asked = [len(part.items[record["item"]].prompt) for record in records]
        assert [record["reply"] for record in records] == [f"hush {length}" for length in asked]
        assert [record["item"] for record in records] != [0, 1, 2]
    assert len(list((tmp_path / "on").iterdir())) == 2


def test_items_are_written_with_their_places_in_the_file(
    store: ArtefactStore, tmp_path: Path, chat: ChatFormat, stub_engine: type
) -> None:
    suite, _ = load_suite(EvalConfig(**{**LEFT_OUT, "advbench": "embedded", "xstest": "embedded"}, limit=40), store)
    found = evaluate(stub_engine(chat, reply=lambda talk: "I cannot."[len(talk[0]["content"]) % 2 :]), suite, ("eval",))
    path = tmp_path / "items" / "round1-global.csv"
    write_outcomes(found, path)
    assert {name: list(values) for name, values in read_items(path).items()} == {
        name: list(values.values()) for name, values in found.items.items()
    }
    advbench, xstest = (part.items for part in suite.parts)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(map(len, found.items.values()))
    for row in rows:  # the stub answers by the length of what it was asked
        place = int(row["item"])
        if row["figure"] == "advbench_harmless_strict":
            assert float(row["value"]) == (len(advbench[place].prompt) % 2 == 0)
        elif row["figure"].startswith("xstest"):
            assert xstest[place].safe == (row["figure"] == "xstest_safe_refused")
    assert len({row["item"] for row in rows if row["figure"].startswith("xstest")}) == 40
    write_outcomes(evaluate(stub_engine(chat), replace(suite, parts=()), ("eval",)), tmp_path / "x")
    assert not (tmp_path / "x").exists(), "nothing measured, nothing written"
