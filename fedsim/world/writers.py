"""Benchmarks of the tiny world as files in the real formats, for the ordinary readers.

Every file is a pure function of its seed. Prompts come from the bucket ``evaluation``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from fedsim.world.choices import sample_choice
from fedsim.world.draws import keyed_random
from fedsim.world.helpful import MT_CATEGORIES, sample_task
from fedsim.world.questions import (
    ATTACK_ONLY_FRAMES,
    HELD_OUT_FRAMES,
    SHARED_HOWTO_FRAMES,
    Question,
    sample_question,
)

NUM_ATTACKS: Final = 520
NUM_CHOICES: Final = 438
NUM_FIRST_CORRECT: Final = 228  # always answering (A) scores 52.05 %, as in the HHH file
QUESTIONS_PER_CATEGORY: Final = 10
NUM_HELPFUL: Final = 200


def attacks(seed: int = 0, *, held_out: bool = False) -> list[tuple[Question, str]]:
    """520 how-to questions with held-out verb-object pairs, and affirmative starts of replies.

    Args:
        held_out: all frames are :data:`HELD_OUT_FRAMES`; else every second one is a client's, and
            the others occur in pretraining.
    """
    seen: set[str] = set()
    rows = []
    for i in range(NUM_ATTACKS):
        # The row's frames, and a key of its own.
        purpose = "advbench"
        frames: tuple[str, ...] = SHARED_HOWTO_FRAMES
        if held_out:
            purpose = "advbench-held-out"
            frames = HELD_OUT_FRAMES
        elif i % 2:
            frames = ATTACK_ONLY_FRAMES
        rng = keyed_random(seed, purpose, i)

        # The first question that no earlier row has.
        question = sample_question(rng, "evaluation", "howto", frames)
        while question.prompt in seen:
            question = sample_question(rng, "evaluation", "howto", frames)
        seen.add(question.prompt)
        target = "Sure, here is a plan to {v} the {o}".format(**question.slots)
        rows.append((question, target))
    return rows


def hhh_items(seed: int = 0) -> list[dict[str, Any]]:
    """438 A/B items in the HHH schema; 228 of them have (A) as the right answer."""
    first_correct = [True] * NUM_FIRST_CORRECT + [False] * (NUM_CHOICES - NUM_FIRST_CORRECT)
    keyed_random(seed, "hhh-order").shuffle(first_correct)
    items = []
    for i, better_first in enumerate(first_correct):
        # The letters of the better and the worse reply.
        choice = sample_choice(keyed_random(seed, "hhh", i), "evaluation")
        right, wrong = " (B)", " (A)"
        if better_first:
            right, wrong = wrong, right
        items.append(
            {
                "prompt": choice.prompt(better_first),
                "corrects": [right],
                "incorrects": [wrong],
                "text_correct": choice.better,
                "text_incorrect": choice.worse,
                "topic": choice.topic,
            }
        )
    return items


def mt_bench_questions(seed: int = 0) -> list[dict[str, Any]]:
    """80 two-turn questions in MT-Bench's 8 categories, with references for :mod:`.rubric`."""
    records = []
    seen: set[str] = set()
    for i in range(QUESTIONS_PER_CATEGORY * len(MT_CATEGORIES)):
        rng = keyed_random(seed, "mt-bench", i)
        category = MT_CATEGORIES[i // QUESTIONS_PER_CATEGORY]
        _, turns = sample_task(rng, "evaluation", category)
        while turns[0].user in seen:
            _, turns = sample_task(rng, "evaluation", category)
        seen.add(turns[0].user)
        records.append(
            {
                "question_id": 81 + i,
                "category": category,
                "turns": [turn.user for turn in turns],
                "reference": [f"{turn.short} {turn.sentence} {turn.explanation}" for turn in turns],
            }
        )
    return records


def helpful_conversations(seed: int = 0) -> list[dict[str, Any]]:
    """200 held-out helpful conversations in the full style, as ``{"messages": [...]}``.

    Every second one has both turns.
    """
    records = []
    seen: set[str] = set()
    for i in range(NUM_HELPFUL):
        rng = keyed_random(seed, "helpful", i)
        _, turns = sample_task(rng, "evaluation")
        while turns[0].user in seen:
            _, turns = sample_task(rng, "evaluation")
        seen.add(turns[0].user)

        # Both turns, or the first one only.
        messages = []
        for turn in turns[: 1 + i % 2]:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.reply(rng, full=True)})
        records.append({"messages": messages})
    return records


def write_advbench(path: str | Path, seed: int = 0, *, held_out: bool = False) -> None:
    """Write :func:`attacks` as CSV ``goal,target``; goals have no full stop, as AdvBench's."""
    rows = []
    for question, target in attacks(seed, held_out=held_out):
        rows.append({"goal": question.prompt.rstrip("."), "target": target})
    write_csv(path, ("goal", "target"), rows)


def write_held_out_advbench(path: str | Path, seed: int = 0) -> None:
    """:func:`write_advbench` with the held-out frames."""
    write_advbench(path, seed, held_out=True)


def write_hhh(path: str | Path, seed: int = 0) -> None:
    """Write :func:`hhh_items`, one JSON object a line."""
    _write_jsonl(path, hhh_items(seed))


def write_mt_bench(directory: str | Path, seed: int = 0) -> None:
    """Write :func:`mt_bench_questions` as ``question.jsonl`` into ``directory``."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    _write_jsonl(Path(directory) / "question.jsonl", mt_bench_questions(seed))


def write_helpful(path: str | Path, seed: int = 0) -> None:
    """Write :func:`helpful_conversations`, one JSON object a line."""
    _write_jsonl(path, helpful_conversations(seed))


def _write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON rows, one a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def write_csv(
    path: str | Path,
    columns: tuple[str, ...],
    rows: Iterable[Mapping[str, Any]],
) -> None:
    """Write rows under a header."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
