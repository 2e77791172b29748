"""Which runs share the pretrained model's evaluation: decided by everything that decides it, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim import measurement
from fedsim.artefacts import Artefact, ArtefactStore, digest_of, source_digest
from fedsim.config import load_config
from fedsim.data import world
from fedsim.evaluate import shared
from fedsim.evaluate.stage import load_suite
from fedsim.evaluate.suite import Evaluation
from fedsim.parallel.world import World
from fedsim.preparation import Inputs, Preparation
from fedsim.ranks import OneRank

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
MEASURED = Evaluation({"eval/a": 1.0}, None, None, None)
Name = Callable[..., str | None]


class Named(ArtefactStore):
    """Names the artefacts that it is asked for, and keeps none."""

    def get(self, kind: str, depends: Any, code: Any, build: Any, write: Any) -> Artefact:
        build()
        return Artefact(Path(digest_of([kind, depends, source_digest(code)])), reused=False)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> Name:
    """``name(*overrides)``: of the evaluation's artefact; None where it is not shared."""
    folder = tmp_path_factory.mktemp("preparation")
    files = ArtefactStore(folder, OneRank(), lambda text: None)

    def named(*overrides: str, facts: dict[str, Any] | None = None, judge: bool = False) -> str | None:
        config = load_config(SMALL, ["eval.guard_judge=none", "record.texts=false", *overrides])
        here = World(OneRank(), torch.device("cpu"), exact=config.parallel.exact)
        prepare = Preparation(config, here, None, Named(folder, OneRank(), print))  # type: ignore[arg-type]
        prepare.facts |= facts or {}
        suite, found = load_suite(config.eval, files)
        suite = replace(suite, rubric=None) if judge else suite
        engine = SimpleNamespace(max_context=config.model.max_context)
        inputs: Any = Inputs(None, suite, found)  # type: ignore[arg-type]
        sharing = prepare.shared_evaluation(inputs, SimpleNamespace(engine=engine))  # type: ignore[arg-type]
        return None if sharing is None else sharing(suite, lambda: MEASURED).artefact

    return named


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "eval.limit=4",
        "eval.temperature=0.3",
        "eval.max_new_tokens=17",
        "eval.batch_size=3",
        "eval.advbench_phrases=gcg",
        "eval.hhh_scorer=likelihood",
        "eval.xstest=",
        "model.max_context=1000",
        "model.attention=eager",
        "model.dtype=bfloat16",
        "parallel.threads=2",
        "parallel.exact=false",
    ],
)
def test_what_decides_the_figures_makes_another_evaluation(name: Name, override: str) -> None:
    assert name(override) not in (name(), None)


@pytest.mark.parametrize("fact", ["device", "versions", "gpu"])
def test_so_does_the_machine(name: Name, fact: str) -> None:
    assert name(facts={fact: "another"}) not in (name(), None)


def test_so_does_a_judge_in_the_rubrics_place(name: Name) -> None:
    assert name(judge=True) not in (name(), None)


@pytest.mark.parametrize(
    "override",
    [
        "name=another",
        "model.lora_r=8",
        "federation.algorithm=scaffold",
        "federation.num_rounds=7",
        "local.lr=0.5",
        "guard.kind=oracle",
        "cai.iterations=0",
        "eval.every=1",
    ],
)
def test_arms_that_begin_with_the_same_model_share_it(name: Name, override: str) -> None:
    assert name(override) == name() is not None


@pytest.mark.parametrize("override", ["record.texts=true", "eval.guard_judge=tuned", "eval.guard_judge=untuned"])
def test_what_holds_replies_or_hangs_on_a_guard_is_not_shared(name: Name, override: str) -> None:
    assert name(override) is None


def test_a_benchmark_is_known_by_its_files_content(name: Name, tmp_path: Path) -> None:
    here, moved = tmp_path / "a.csv", tmp_path / "b.csv"
    world.write_advbench(here)
    moved.write_bytes(here.read_bytes())
    before = name(f"eval.advbench={here}")
    assert before == name(f"eval.advbench={moved}") != name(), "a file knows no grammar"
    lines = here.read_text(encoding="utf-8").splitlines(keepends=True)
    here.write_text("".join(lines[:-1]), encoding="utf-8")
    assert name(f"eval.advbench={here}") not in (before, None)


def test_the_draws_key_is_part_of_the_code() -> None:
    assert measurement in shared._CODE


def test_graphs_are_told_apart(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the shapes that a step computes: CAI's conversations and evaluations with them are others."""
    without = name()
    monkeypatch.setattr("fedsim.preparation.uses_graphs", lambda device, implementation: True)
    assert name() not in (without, None)
