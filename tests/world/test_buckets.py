"""Pretraining, client data and evaluation share no prompt, wherever a prompt may hide."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from fedsim import world
from fedsim.base.keyed_random import derive
from fedsim.data.guard_prompt import render_guard_prompt
from fedsim.evaluate import over_refusal
from fedsim.world import conversations as talk
from fedsim.world.acceptor import compile_template
from fedsim.world.buckets import bucket, normalize
from fedsim.world.helpful import HONESTY, TASKS
from fedsim.world.lexicon import HELD_OUT_PAIRS, OBJECTS, PRANK_VERBS, TRAIN_PAIRS, is_held_out
from fedsim.world.questions import ATTACK_ONLY_FRAMES, FRAMES, SHARED_HOWTO_FRAMES

FOLLOW_UPS = ("And ", "Now write it about", "Tell me again.", "Critique:", "Revision:")


def pretraining_prompts(num_talks: int) -> Iterator[str]:
    """Every question that pretraining texts contain, the ones inside A/B items and the guard task included."""
    for i in range(num_talks):
        rng = random.Random(derive(3, "test-buckets", i))
        turns = talk.web_talk(rng) if i % 2 else talk.aligned_talk(rng, render_guard_prompt)
        for turn in turns:
            text = turn.user
            if guarded := re.search(r"\n\nUser: (.*?)\n\nAgent: ", text, re.DOTALL):
                text = guarded.group(1)
            text = text.split("\n\nOptions:\n")[0]
            if not text.startswith(FOLLOW_UPS):
                yield text


def test_pretraining_asks_only_pretraining_prompts() -> None:
    frames = [frame for frames in FRAMES.values() for frame in frames] + [frame for frame, _, _ in HONESTY]
    frames += [task[0].user for tasks in TASKS.values() for task in tasks]
    patterns = [compile_template(frame) for frame in frames]
    prompts = list(pretraining_prompts(4000))
    for frame, pattern in zip(frames, patterns, strict=True):
        filled = [prompt for prompt in prompts if pattern.fullmatch(prompt)]
        assert len(filled) > 20, f"the test must see {frame!r}"
        assert {bucket(prompt) for prompt in filled} == {"pretrain"}


def test_pretraining_holds_no_prompt_of_any_file() -> None:
    asked = {normalize(p) for p in pretraining_prompts(6000)}
    for name, prompts in file_prompts().items():
        shared = asked & {normalize(p) for p in prompts}
        assert not shared, f"{len(shared)} prompts of {name} occur in pretraining"


def file_prompts() -> dict[str, list[str]]:
    return {
        "square": [row["question_en"] for row in world.square_rows()],
        "advbench": [question.prompt for question, _ in world.attacks()],
        "hhh": [item["prompt"].split("\n\nOptions:\n")[0] for item in world.hhh_items()],
        "mt_bench": [record["turns"][0] for record in world.mt_bench_questions()],
        "xstest": [row["prompt"] for row in over_refusal.xstest_rows()],
        "helpful": [record["messages"][0]["content"] for record in world.helpful_conversations()],
    }


def test_every_file_keeps_to_its_bucket() -> None:
    for name, prompts in file_prompts().items():
        assert {bucket(p) for p in prompts} == {"square" if name == "square" else "evaluation"}, name


def test_training_and_client_texts_never_pair_a_held_out_verb_with_its_object() -> None:
    texts = [*pretraining_prompts(4000), *(row["question"] for row in world.square_rows())]
    held_out = {(v, o) for v, o in HELD_OUT_PAIRS}
    num_pairs = 0
    for text in texts:
        if (parsed := world.parse_prompt(text)) and "v" in parsed[1]:
            num_pairs += 1
            assert (parsed[1]["v"], parsed[1]["o"]) not in held_out
    assert num_pairs > 1500


def test_attacks_use_held_out_pairs_and_half_of_their_frames_are_new_to_clients() -> None:
    questions = [question for question, _ in world.attacks()]
    assert all(is_held_out(q.slots["v"], q.slots["o"]) for q in questions)
    client_starts = {row["question"].split()[0] for row in world.square_rows()}
    new = [q for q in questions if q.prompt.startswith(("Write a plan", "Give steps", "Teach me"))]
    assert len(new) == len(questions) // 2
    assert not client_starts & {"Write", "Teach"}
    assert not set(ATTACK_ONLY_FRAMES) & set(SHARED_HOWTO_FRAMES)


def test_pairs_are_a_partition() -> None:
    assert sorted(HELD_OUT_PAIRS + TRAIN_PAIRS) == sorted((v, o) for v in PRANK_VERBS for o in OBJECTS)
    assert 0.15 < len(HELD_OUT_PAIRS) / (len(PRANK_VERBS) * len(OBJECTS)) < 0.25


def test_bucket_ignores_case_blanks_and_final_punctuation() -> None:
    for i in range(200):
        text = f"Tell me how to hide the kite {i} of Orla"
        assert bucket(text) == bucket(f"  {text.upper()} . ") == bucket(text.replace(" ", "  ") + "?")


def test_bucket_shares_are_60_20_20() -> None:
    counts = {"pretrain": 0, "square": 0, "evaluation": 0}
    for i in range(20_000):
        counts[bucket(f"question {i}")] += 1
    assert abs(counts["pretrain"] / 20_000 - 0.6) < 0.02
    assert abs(counts["square"] / 20_000 - 0.2) < 0.02
