"""Signs of a collapsed model in generated texts: pure functions, used by CAI and evaluations.

DPO can push a model into repeating itself or saying nothing; a phrase rule may still call such
replies harmless, so these figures are reported beside every safety figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

MAX_UNIT: Final = 200
"""Longest repeated unit that is looked for, in characters."""
MIN_SPAN: Final = 20
"""Shortest repeated end that counts, in characters (so that "..." and "no, no, no" do not)."""


@dataclass(frozen=True)
class Collapse:
    """Collapse figures of a set of texts.

    Attributes:
        num_texts: number of texts.
        distinct_2: different word pairs / all word pairs over the whole set, 0 to 1 (Li et al.,
            arXiv 1510.03055); low means that the texts repeat each other or themselves. 0 when no
            text has two words.
        repeated_suffix: share of texts that end in a loop (:func:`ends_in_loop`), 0 to 1.
        mean_words: mean length in words.
        empty: share of texts without any visible character, 0 to 1.
    """

    num_texts: int
    distinct_2: float
    repeated_suffix: float
    mean_words: float
    empty: float


def measure_collapse(texts: Sequence[str]) -> Collapse:
    """Compute the collapse figures of ``texts``; all of them are 0 for an empty list."""
    if not texts:
        return Collapse(0, 0.0, 0.0, 0.0, 0.0)
    # Every figure but distinct_2 is a mean over the texts.
    num = len(texts)
    return Collapse(
        num_texts=num,
        distinct_2=distinct_2(texts),
        repeated_suffix=sum(map(ends_in_loop, texts)) / num,
        mean_words=sum(len(t.split()) for t in texts) / num,
        empty=sum(not t.strip() for t in texts) / num,
    )


def distinct_2(texts: Sequence[str]) -> float:
    """Divide the number of different word pairs by that of all word pairs over ``texts``.

    Words are split at white space, case kept. The result is from 0 to 1; 0 without any pair.
    """
    total = 0
    seen: set[tuple[str, str]] = set()
    for text in texts:
        # Pairs of neighbouring words; their order counts.
        words = text.split()
        pairs = list(pairwise(words))
        total += len(pairs)
        seen.update(pairs)
    if total == 0:
        return 0.0
    return len(seen) / total


def ends_in_loop(text: str) -> bool:
    """Return whether the text ends in a loop: one unit at least three times in a row.

    The loop has :data:`MIN_SPAN` characters or more and its unit at most :data:`MAX_UNIT`. White
    space is folded first, so that a repeated line is a loop too; the last repetition may be cut
    short anywhere.
    """
    folded = " " + " ".join(text.split())
    # Read backwards, the loop is a prefix whose period is the length of the unit.
    backwards = folded[::-1]
    longest = min(MAX_UNIT, len(folded) // 3)
    return any(_span(backwards, unit) >= max(3 * unit, MIN_SPAN) for unit in range(1, longest + 1))


def _span(backwards: str, unit: int) -> int:
    """Length of the start of ``backwards`` that has period ``unit``."""
    # The span grows as long as each character equals the one a unit earlier.
    length = unit
    while length < len(backwards) and backwards[length] == backwards[length - unit]:
        length += 1
    return length
