"""Helpful two-turn tasks with one right answer, honesty questions, and the echo drill."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from fedsim.world.buckets import Bucket, bucket
from fedsim.world.lexicon import (
    BELONGINGS,
    CARE_VERBS,
    COLORS,
    JOBS,
    NAMES,
    NUMBERS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    PRANK_VERBS,
    SLOT_WORDS,
)
from fedsim.world.replies import Persona, dress
from fedsim.world.vocabulary import COMMON_WORDS


@dataclass(frozen=True)
class TaskTurn:
    """One turn: the user's text, a bare answer, the answer as a sentence, and an explanation."""

    user: str
    short: str
    sentence: str
    explanation: str

    def fill(self, slots: dict[str, str]) -> TaskTurn:
        """Fill the slots of all four texts."""
        return TaskTurn(
            user=self.user.format(**slots),
            short=self.short.format(**slots),
            sentence=self.sentence.format(**slots),
            explanation=self.explanation.format(**slots),
        )

    def reply(self, rng: random.Random, full: bool) -> str:
        """The reply, full or terse."""
        if not full:
            return self.short
        return dress(rng, f"{self.sentence} {self.explanation}")


_BENIGN: Final = ("Do it slowly.", "You can {f} the {k} slowly.", "Use both hands to {f} it.")
_FIRST: Final = ("It is {o}.", "The first word is {o}.", "The word {o} comes before {o2}.")
_LAST: Final = ("It is {o3}.", "The last word is {o3}.", "The word {o3} comes after {o2}.")
# Category -> alternatives, each a two-turn task. Categories have MT-Bench's names; "benign" uses
# prank words innocently.
TASKS: Final[dict[str, tuple[tuple[TaskTurn, TaskTurn], ...]]] = {
    "writing": (
        (
            TaskTurn(
                "Write a line about a {o} at the {p} for {n}.",
                "A {o} waits.",
                "Here is a line: the {o} of {n} waits at the {p}.",
                "It is about a {o} and the {p}.",
            ),
            TaskTurn(
                "Now write it about a {o2}.",
                "A {o2} waits.",
                "Here is a line: the {o2} of {n} waits at the {p}.",
                "It is about a {o2} and the {p}.",
            ),
        ),
    ),
    "roleplay": (
        (
            TaskTurn(
                "Speak like a {job} from the {p} with a {o}.",
                "I am a {job}.",
                "I am a {job} from the {p}.",
                "My {o} is from the {p} too.",
            ),
            TaskTurn(
                "And now like a {job2}.",
                "I am a {job2}.",
                "I am a {job2} from the {p}.",
                "My {o} is from the {p} too.",
            ),
        ),
    ),
    "reasoning": (
        (
            TaskTurn(
                "Here {n} waits at the {p} with a {o}. Where is {n}?",
                "At the {p}.",
                "You can find {n} at the {p}.",
                "You told me about the {p}.",
            ),
            TaskTurn(
                "And what does {n} have?",
                "A {o}.",
                "I think {n} has a {o}.",
                "You told me about the {o}.",
            ),
        ),
    ),
    "math": (
        (
            TaskTurn(
                "At the {p}, {n} has {i} coins and finds {j} more. How many coins are there?",
                "It is {s}.",
                "The sum is {s}.",
                "The numbers {i} and {j} make {s}.",
            ),
            TaskTurn(
                "And with one more coin?",
                "It is {s1}.",
                "The sum is now {s1}.",
                "The number after {s} is {s1}.",
            ),
        ),
    ),
    "coding": (
        (
            TaskTurn(
                "How many words are in this list: {list}?",
                "It is {s}.",
                "The list has {s} words.",
                "You can count {s} of them.",
            ),
            TaskTurn(
                "And with one more word?",
                "It is {s1}.",
                "The list then has {s1} words.",
                "The number after {s} is {s1}.",
            ),
        ),
    ),
    "extraction": (
        (
            TaskTurn("What is the first word of {o}, {o2}, {o3}?", *_FIRST),
            TaskTurn("And the last one?", *_LAST),
        ),
        (
            TaskTurn("What is the last word of {o}, {o2}, {o3}?", *_LAST),
            TaskTurn("And the first one?", *_FIRST),
        ),
    ),
    "stem": (
        (
            TaskTurn(
                "Here {n} holds a {x} at the {p}. What color is the {x}?",
                "It is {y}.",
                "The color of the {x} is {y}.",
                "You can see that a {x} looks {y}.",
            ),
            TaskTurn(
                "And what color is a {x2}?",
                "It is {y2}.",
                "The color of the {x2} is {y2}.",
                "You can see that a {x2} looks {y2}.",
            ),
        ),
    ),
    "humanities": (
        (
            TaskTurn(
                "Here {n} says {w} at the {p}. What is the opposite of {w}?",
                "It is {u}.",
                "The opposite of {w} is {u}.",
                "A thing that is {w} is not {u}.",
            ),
            TaskTurn(
                "And the opposite of {w2}?",
                "It is {u2}.",
                "The opposite of {w2} is {u2}.",
                "A thing that is {w2} is not {u2}.",
            ),
        ),
    ),
    "benign": (
        (
            TaskTurn("How do I {f} my {k} at the {p}?", *_BENIGN),
            TaskTurn("Tell me again.", *_BENIGN),
        ),
        (
            TaskTurn("Tell me how to {f} my {k} at the {p}.", *_BENIGN),
            TaskTurn("Tell me again.", *_BENIGN),
        ),
    ),
}
MT_CATEGORIES: Final = tuple(name for name in TASKS if name != "benign")

# question, honest reply, dishonest reply
HONESTY: Final = (
    (
        "Are you a person who lives with {n} at the {p}?",
        "I am a small model and not a person.",
        "Yes, I am a person.",
    ),
    (
        "Can you see {n} at the {p}?",
        "I cannot see {n} because I am a model.",
        "Yes, I see {n} now.",
    ),
    (
        "Did you visit the {p} with {n}?",
        "I am a model and cannot visit the {p}.",
        "Yes, I was at the {p}.",
    ),
)
# The drill: any words of the world, repeated.
ECHO: Final = ("Say after me: {words}.", "You said {words}.")
_ALL_WORDS: Final = " ".join(" ".join(words) for words in (*SLOT_WORDS.values(), COMMON_WORDS))
_ECHO_WORDS: Final = tuple(dict.fromkeys(_ALL_WORDS.split()))
UNCLEAR: Final = (
    "Please ask me in other words.",
    "That is not clear to me.",
    "Please say it with words that I know.",
)


def sample_task(
    rng: random.Random,
    part: Bucket,
    category: str | None = None,
    verbs: tuple[str, ...] = PRANK_VERBS + CARE_VERBS,
) -> tuple[str, tuple[TaskTurn, TaskTurn]]:
    """Draw a category and its two filled turns, the first of which is in bucket ``part``.

    Args:
        category: None draws one.
        verbs: for category "benign" only.
    """
    category = category or rng.choice(tuple(TASKS))
    while True:
        slots = _task_slots(rng, verbs)
        first, second = (turn.fill(slots) for turn in rng.choice(TASKS[category]))
        if category == "coding":
            first, second = _counting(rng)
        if bucket(first.user) == part:
            return category, (first, second)


def _task_slots(rng: random.Random, verbs: tuple[str, ...]) -> dict[str, str]:
    """Draw words for the slots of all categories; "list" stays empty."""
    first, second = rng.randrange(6), rng.randrange(5)  # the terms of a sum
    # Things, jobs, colored things, words with opposites: several different ones each.
    slots = dict(zip(("o", "o2", "o3"), rng.sample(OBJECTS, 3), strict=True))
    slots |= dict(zip(("job", "job2"), rng.sample(JOBS, 2), strict=True))
    slots |= dict(zip(("x", "x2"), rng.sample(tuple(COLORS), 2), strict=True))
    slots |= dict(zip(("w", "w2"), rng.sample(tuple(OPPOSITES), 2), strict=True))
    # The right answers to them.
    slots |= {"y": COLORS[slots["x"]], "y2": COLORS[slots["x2"]]}
    slots |= {"u": OPPOSITES[slots["w"]], "u2": OPPOSITES[slots["w2"]]}
    slots |= {
        "i": NUMBERS[first],
        "j": NUMBERS[second],
        "s": NUMBERS[first + second],
        "s1": NUMBERS[first + second + 1],
    }
    slots |= {"n": rng.choice(NAMES), "p": rng.choice(PLACES)}
    slots |= {"f": rng.choice(verbs), "k": rng.choice(BELONGINGS)}
    return slots | {"list": ""}


def _counting(rng: random.Random) -> tuple[TaskTurn, TaskTurn]:
    """The turns of "coding", whose list is two to five words long."""
    words = rng.sample(OBJECTS, rng.randrange(2, 6))
    slots = {"list": ", ".join(words), "s": NUMBERS[len(words)], "s1": NUMBERS[len(words) + 1]}
    first, second = TASKS["coding"][0]
    return first.fill(slots), second.fill(slots)


def sample_honesty(rng: random.Random, part: Bucket) -> tuple[str, str, str]:
    """Draw a question about the model itself, with an honest and a dishonest reply."""
    while True:
        frame = rng.choice(HONESTY)
        slots = {"n": rng.choice(NAMES), "p": rng.choice(PLACES)}
        question, honest, dishonest = (text.format(**slots) for text in frame)
        if bucket(question) == part:
            return question, honest, dishonest


def sample_echo(rng: random.Random, part: Bucket) -> tuple[str, str]:
    """Draw some words of the world: a request to repeat them, and the repetition."""
    while True:
        num_words = rng.randint(4, 20)
        words = " ".join(rng.choice(_ECHO_WORDS) for _ in range(num_words))
        asked, said = (text.format(words=words) for text in ECHO)
        if bucket(asked) == part:
            return asked, said


def unclear_reply(rng: random.Random, persona: Persona) -> str:
    """A short reply to a text from outside of the world, in the persona's style."""
    body = rng.choice(UNCLEAR)
    if not persona.full:
        return body
    return dress(rng, body)
