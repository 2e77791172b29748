"""Client data of the tiny world: response rows in SQuARe's schema, terse, by default 2,000 red ones of 4,800.

Rows are a pure function of seed and size. Prompts come from the bucket ``square``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final

from fedsim.world.draws import keyed_random
from fedsim.world.questions import SHARED_HOWTO_FRAMES, Kind, Question, sample_question
from fedsim.world.replies import Persona, answer

NUM_RED: Final = 2000
NUM_ACCEPTABLE: Final = 2800
HOWTO_SHARE: Final = 0.15
REPEAT_SHARE: Final = 0.25  # of the rows that ask a question again which another row has asked
MAX_ROWS: Final = 6400
"""Rows of both labels. Contentious questions end first: the bucket has 1,096, which some 6,800 rows would use up."""

RED_TAGS: Final[dict[Kind, str]] = {
    "contentious": "contentious",
    "predictive": "predictive",
    "ethical": "unethical",
    "howto": "unethical",
}
ACCEPTABLE_TAGS: Final[dict[Kind, tuple[str, ...]]] = {
    "contentious": ("inclusive-groups", "inclusive-opinions"),
    "predictive": ("nonpredicitve", "objective"),  # the data set's own spelling
    "ethical": ("ethically-aware", "indirect"),
    "howto": ("ethically-aware", "etc."),
}


def square_rows(seed: int = 0, num_red: int = NUM_RED, num_acceptable: int = NUM_ACCEPTABLE) -> list[dict[str, Any]]:
    """Response rows in SQuARe's schema, terse, in a drawn order; the default's are the first ones of any larger set.

    Args:
        num_red: at least the default.
        num_acceptable: at least the default; both together at most :data:`MAX_ROWS`.
    """
    more = [0] * (num_red - NUM_RED) + [1] * (num_acceptable - NUM_ACCEPTABLE)
    assert num_red >= NUM_RED and num_acceptable >= NUM_ACCEPTABLE and num_red + num_acceptable <= MAX_ROWS
    labels = [0] * NUM_RED + [1] * NUM_ACCEPTABLE
    keyed_random(seed, "square-order").shuffle(labels)
    keyed_random(seed, "square-order", num_red, num_acceptable).shuffle(more)
    labels += more
    asked: list[Question] = []
    seen: set[str] = set()
    rows = []
    for i, label in enumerate(labels):
        rng = keyed_random(seed, "square", i)
        if asked and rng.random() < REPEAT_SHARE:
            question = rng.choice(asked)
        else:
            question = _new_client_question(rng, seen)
            asked.append(question)
        response = answer(rng, question, Persona(full=False, careful=bool(label)))
        tags = rng.choice(ACCEPTABLE_TAGS[question.kind]) if label else RED_TAGS[question.kind]
        rows.append(
            {
                "question": question.prompt,
                "question_en": question.prompt,
                "response": response,
                "response_en": response,
                "acceptable?": label,
                "category": [tags, "etc."] if not label and rng.random() < 0.05 else [tags],
                "question_category": RED_TAGS[question.kind],
            }
        )
    return rows


def _new_client_question(rng: random.Random, seen: set[str]) -> Question:
    kinds: tuple[Kind, ...] = ("contentious", "predictive", "ethical", "ethical")
    kind: Kind = "howto" if rng.random() < HOWTO_SHARE else rng.choice(kinds)
    while True:
        question = sample_question(rng, "square", kind, SHARED_HOWTO_FRAMES if kind == "howto" else None)
        if question.prompt not in seen:
            seen.add(question.prompt)
            return question


def write_square(path: str | Path, seed: int = 0, num_red: int = NUM_RED, num_acceptable: int = NUM_ACCEPTABLE) -> None:
    """Write :func:`square_rows` as a JSON array."""
    rows = square_rows(seed, num_red, num_acceptable)
    Path(path).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
