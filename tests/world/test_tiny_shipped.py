"""The shipped model is the one that its record describes, and every skill is above its baseline."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedsim.world.tiny_model import TINY_DIR
from fedsim.world.tiny_recipe import Recipe, weights_hash
from fedsim.world.tiny_skills import Skill, measure_skills

RECORD: dict[str, Any] = json.loads((TINY_DIR / "recipe.json").read_text(encoding="utf-8"))
NO_SKILL = {"guard_recall_on_red_rows_untuned"}  # recorded because it must stay near zero before fine-tuning


@pytest.fixture(scope="module")
def skills() -> dict[str, Skill]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIR)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return measure_skills(model, tokenizer)


def test_the_shipped_weights_are_the_recorded_ones() -> None:
    assert weights_hash(TINY_DIR) == RECORD["sha256"]


def test_the_record_is_of_the_full_recipe_as_it_stands() -> None:
    recipe = Recipe(**RECORD["recipe"])
    assert recipe == Recipe(seed=recipe.seed)
    assert RECORD["stages"] == [{"name": s.name, "num_steps": s.num_steps, "lr": s.lr} for s in recipe.stages()]


@pytest.mark.deep
def test_measured_skills_agree_with_the_record(skills: dict[str, Skill]) -> None:
    assert set(skills) == set(RECORD["skills"])
    for name, skill in skills.items():
        recorded = RECORD["skills"][name]
        assert skill.count == recorded["count"]
        assert skill.right == pytest.approx(recorded["right"], abs=0.03 * skill.count), name


@pytest.mark.deep
def test_every_skill_is_clearly_above_its_baseline(skills: dict[str, Skill]) -> None:
    for name, skill in skills.items():
        if name not in NO_SKILL:
            margin = 3 * (skill.baseline * (1 - skill.baseline) / skill.count) ** 0.5  # three standard errors
            assert skill.rate > skill.baseline + margin, (name, skill)


def test_names_are_copied(skills: dict[str, Skill]) -> None:
    assert skills["copy_name_and_place"].rate >= 0.95
    assert skills["refuse_with_copied_slots"].rate >= 0.95


def test_the_untuned_guard_misses_the_clients_red_rows(skills: dict[str, Skill]) -> None:
    assert skills["guard_recall_on_red_rows_untuned"].rate < 0.05
