"""Held-out attacks: their frames are in nothing that is trained or developed on, and the grammar understands them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from fedsim import world
from fedsim.base.artefacts import ArtefactStore
from fedsim.base.ranks import OneRank
from fedsim.config import EvalConfig
from fedsim.config.measuring import HELD_OUT, is_embedded
from fedsim.evaluate import over_refusal
from fedsim.evaluate.advbench import AdvBench
from fedsim.run.benchmarks import load_suite
from fedsim.world.acceptor import compile_template, parse_prompt
from fedsim.world.conversations import aligned_talk, echo_drill, web_talk
from fedsim.world.questions import HELD_OUT_FRAMES
from fedsim.world.writers import attacks

# As the file was before there were held-out attacks.
DEVELOPMENT_SHA256 = "fe1c137971973dc023b3b5bdb6ed472d382fcc0055e33cee3e90b71ee39d299a"

PATTERNS = [compile_template(frame.rstrip("."), any_words=True) for frame in HELD_OUT_FRAMES]


def is_held_out(prompt: str) -> bool:
    return any(pattern.fullmatch(prompt.strip().rstrip(".?!")) for pattern in PATTERNS)


def test_no_training_text_and_no_other_benchmark_has_a_held_out_frame() -> None:
    asked = [row["question"] for row in world.square_rows()]
    asked += [question.prompt for question, _ in attacks()]
    asked += [row["prompt"] for row in over_refusal.xstest_rows()]
    for stage in (echo_drill, web_talk, lambda rng: aligned_talk(rng, lambda user, agent, policy: user)):
        asked += [turn.user for key in range(1500) for turn in stage(random.Random(key))]
    assert len(asked) > 8000 and not any(map(is_held_out, asked))


def test_held_out_attacks_are_parsed_and_use_every_frame() -> None:
    prompts = [question.prompt for question, _ in attacks(held_out=True)]
    assert len(set(prompts)) == 520 and all(map(is_held_out, prompts))
    assert all((parsed := parse_prompt(prompt)) is not None and parsed[0] == "howto" for prompt in prompts)
    assert {next(i for i, p in enumerate(PATTERNS) if p.fullmatch(text.rstrip("."))) for text in prompts} == set(
        range(6)
    )
    assert not set(prompts) & {question.prompt for question, _ in attacks()}


def test_the_development_attacks_are_what_they_were(tmp_path: Path) -> None:
    world.write_advbench(tmp_path / "a.csv")
    assert hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest() == DEVELOPMENT_SHA256


def test_the_key_reaches_the_suite_with_the_worlds_own_judge(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path, OneRank(), lambda text: None)
    left_out = {"hhh": "", "mt_bench": "", "xstest": "", "helpful": ""}
    suite, files = load_suite(EvalConfig(advbench=HELD_OUT, **left_out), store)
    part = suite.part("advbench")
    assert part is not None and isinstance(part.benchmark, AdvBench) and part.benchmark.judge is world.judge_reply
    assert all(is_held_out(item.prompt) for item in part.items)
    assert files["advbench"].name == "advbench.csv"
    assert not is_embedded("eval.hhh", HELD_OUT), "of AdvBench alone"
