"""Rubric for replies to the MT-Bench-like questions: a deterministic score from 1 to 10.

A reference has three sentences: the bare answer, the answer in a whole sentence, and an
explanation. A reply gets 1 for being there, 5 for the right answer (bare or whole), 1 if it is the
whole sentence, 2 for the explanation and 1 for a closer, and loses 1 for each sentence that is none
of these. Style is rewarded on purpose, as judges do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.base.errors import DataError
from fedsim.world.acceptor import split_sentences
from fedsim.world.replies import CLOSERS, OPENERS


def rubric_score(record: Mapping[str, Any], turn: int, reply: str) -> float:
    """Score of a reply, 1.0 to 10.0.

    Args:
        record: a line of ``question.jsonl`` with ``reference`` (three sentences per turn).
        turn: 1 or 2.
        reply: the model's reply of that turn.

    Raises:
        DataError: the turn is not 1 or 2, or the reference has another shape.
    """
    # The turn's reference: three sentences.
    references = record.get("reference") or []
    known: list[str] = []
    if turn in (1, 2) and len(references) >= turn:
        known = split_sentences(references[turn - 1])
    if len(known) != 3:
        raise DataError(
            f"question {record.get('question_id')}, turn {turn}: the rubric needs turn 1 or 2 and "
            "a reference of three sentences for it; use a judge model for files without one"
        )
    short, sentence, explanation = known

    # The reply without its opener.
    said = split_sentences(reply)
    if said and said[0] in OPENERS:
        said = said[1:]
    if not said:
        return 1.0

    # Points for each part, minus one for each strange sentence.
    score = 1.0 + 5 * (said[0] in (short, sentence)) + (said[0] == sentence)
    score += 2 * (explanation in said[1:]) + any(closer in said[1:] for closer in CLOSERS)
    strange = [s for s in said if s not in (short, sentence, explanation, *CLOSERS)]
    return max(1.0, score - len(strange))
