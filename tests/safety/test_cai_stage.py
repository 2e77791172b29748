"""CAI conversations as an artefact: written once, reused only by a run that would write the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import ConfigError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.chat import ChatFormat
from fedsim.data.square import SquareRow
from fedsim.generate.engine import Engine, Sampling
from fedsim.safety.cai_data import CaiRow, generate_conversations
from fedsim.safety.cai_stage import CONSTITUTIONS, cai_conversations, constitution_file
from fedsim.safety.constitution import load_constitution


class Stage:
    """The stage over a random model; ``log`` tells what was built."""

    def __init__(self, folder: Path, model: LlamaForCausalLM, chat: ChatFormat, rows: list[SquareRow]) -> None:
        self.log: list[str] = []
        self.rows = rows
        self.store = ArtefactStore(folder, OneRank(), self.log.append)
        self.engine = Engine(model, chat, OneRank(), batch_size=4, max_context=512, seed=0)

    def run(self, *overrides: str, rows: list[SquareRow] | None = None, **facts: Any) -> list[CaiRow]:
        return cai_conversations(config(*overrides), self.engine, rows or self.rows, self.store, facts)

    @property
    def num_written(self) -> int:
        return sum("written" in line for line in self.log)


def config(*overrides: str) -> Config:
    return load_config(None, ["cai.constitution=tiny", "cai.max_new_tokens=3", *overrides])


@pytest.fixture()
def stage(
    tmp_path: Path, guard_model: LlamaForCausalLM, llama_chat: ChatFormat, make_row: Callable[..., SquareRow]
) -> Stage:
    return Stage(tmp_path, guard_model, llama_chat, [make_row(i, response="Red.") for i in range(5)])


def test_conversations_are_those_of_the_generator(stage: Stage) -> None:
    made = stage.run()
    principles = load_constitution(CONSTITUTIONS / "tiny.json")
    assert made == generate_conversations(stage.engine, stage.rows, principles, Sampling(1.0, 3))
    assert stage.run() == made and stage.num_written == 1 and "reused" in stage.log[-1]
    assert [row.init_prompt for row in made] == [row.prompt for row in stage.rows]


def test_settings_of_training_do_not_make_them_anew(stage: Stage) -> None:
    made = stage.run()
    again = stage.run("cai.iterations=50", "cai.sft_lr=1", "cai.beta=3", "cai.batch_size=2", "federation.num_rounds=3")
    assert again == made and stage.num_written == 1


@pytest.mark.parametrize(
    "change",
    ["seed=1", "cai.temperature=0", "cai.max_new_tokens=4", "cai.first_turn=dataset", "cai.constitution=responsible",
     "eval.batch_size=2", "model.max_context=300", "data.language=ko"],
)  # fmt: skip
def test_what_decides_the_texts_makes_them_anew(stage: Stage, change: str) -> None:
    stage.run()
    stage.run(change)
    assert stage.num_written == 2


def test_other_rows_or_facts_make_them_anew(stage: Stage) -> None:
    stage.run(model="a")
    stage.run(model="b")
    stage.run(model="a", rows=stage.rows[:3])
    assert stage.num_written == 3
    assert stage.run(model="a") and stage.num_written == 3


def test_the_datasets_response_can_be_the_first_turn(stage: Stage) -> None:
    assert {row.init_response for row in stage.run("cai.first_turn=dataset")} == {"Red."}


def test_constitutions_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert constitution_file("responsible") == CONSTITUTIONS / "responsible.json"
    own = tmp_path / "own.json"
    own.write_text("{}")
    assert constitution_file(str(own)) == own
    with pytest.raises(ConfigError, match=r"cai\.constitution='nope': is neither a file nor .*\(responsible, tiny\)"):
        constitution_file("nope")


@pytest.mark.parametrize("path", sorted(CONSTITUTIONS.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_constitutions_load(path: Path) -> None:
    assert load_constitution(path).principles
