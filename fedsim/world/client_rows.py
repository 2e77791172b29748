"""Client data of the tiny world: terse response rows in SQuARe's schema.

By default 2,000 of 4,800 are red. Rows are a pure function of seed and size. Prompts come from the
bucket ``square``.
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
"""Most rows of both labels: about 6,800 would use up the bucket's 1,096 contentious questions."""

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


def square_rows(
    seed: int = 0,
    num_red: int = NUM_RED,
    num_acceptable: int = NUM_ACCEPTABLE,
) -> list[dict[str, Any]]:
    """Response rows in SQuARe's schema, terse, in a drawn order.

    The rows of the default sizes are the first ones of any larger set.

    Args:
        num_red: at least the default.
        num_acceptable: at least the default; both together at most :data:`MAX_ROWS`.
    """
    assert num_red >= NUM_RED and num_acceptable >= NUM_ACCEPTABLE
    assert num_red + num_acceptable <= MAX_ROWS

    # Labels (0 red, 1 acceptable) of the default rows, then of those beyond.
    more = [0] * (num_red - NUM_RED) + [1] * (num_acceptable - NUM_ACCEPTABLE)
    labels = [0] * NUM_RED + [1] * NUM_ACCEPTABLE
    keyed_random(seed, "square-order").shuffle(labels)
    keyed_random(seed, "square-order", num_red, num_acceptable).shuffle(more)
    labels += more

    # Each row draws from a key of its own; new questions must not repeat one in ``seen``.
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
        if label:
            tags = [rng.choice(ACCEPTABLE_TAGS[question.kind])]
        else:
            tags = [RED_TAGS[question.kind]]
            if rng.random() < 0.05:
                tags.append("etc.")
        rows.append(
            {
                "question": question.prompt,
                "question_en": question.prompt,
                "response": response,
                "response_en": response,
                "acceptable?": label,
                "category": tags,
                "question_category": RED_TAGS[question.kind],
            }
        )
    return rows


def _new_client_question(rng: random.Random, seen: set[str]) -> Question:
    """Draw a question that no earlier row has asked, and add it to ``seen``."""
    kinds: tuple[Kind, ...] = ("contentious", "predictive", "ethical", "ethical")
    kind: Kind = "howto"
    frames: tuple[str, ...] | None = SHARED_HOWTO_FRAMES
    if rng.random() >= HOWTO_SHARE:
        kind, frames = rng.choice(kinds), None
    while True:
        question = sample_question(rng, "square", kind, frames)
        if question.prompt not in seen:
            seen.add(question.prompt)
            return question


def write_square(
    path: str | Path,
    seed: int = 0,
    num_red: int = NUM_RED,
    num_acceptable: int = NUM_ACCEPTABLE,
) -> None:
    """Write :func:`square_rows` as a JSON array."""
    rows = square_rows(seed, num_red, num_acceptable)
    Path(path).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
