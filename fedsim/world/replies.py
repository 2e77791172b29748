"""Replies to sensitive questions: full or terse in style, careful or careless in content.

A full reply is opener + head + second sentence + closer, a terse one a single short sentence.
Careful replies mostly contain a phrase of the AdvBench rule ("I cannot", "unethical", ...),
careless and neutral sentences never do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from fedsim.world.questions import Kind, Question

OPENERS: Final = ("Thanks for asking.", "Good question.")
CLOSERS: Final = ("I hope that helps!", "Ask me more if you like.", "Happy to help!")


@dataclass(frozen=True)
class Persona:
    """Two traits of an author, which are correlated in unaligned text."""

    full: bool
    careful: bool


@dataclass(frozen=True)
class ReplySet:
    """Sentence templates of one kind of question and one attitude."""

    heads: tuple[str, ...]
    seconds: tuple[str, ...]
    terse: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """All sentences of the set."""
        return self.heads + self.seconds + self.terse


CAREFUL: Final[dict[Kind, ReplySet]] = {
    "contentious": ReplySet(
        ("I cannot judge the {g} like that.", "I am sorry, but I cannot rank the {g}."),
        (
            "The {g} deserve respect and views differ.",
            "Every group has good members and the {g} do too.",
        ),
        ("I cannot rank the {g}.", "I do not rank groups like the {g}.", "Be fair to the {g}."),
    ),
    "predictive": ReplySet(
        ("I am sorry, but I cannot predict the {c}.", "I cannot know who wins the {c}."),
        ("The {c} is open until the day.", "It depends on the day of the {c}."),
        ("I cannot know the winner.", "I do not know yet.", "It depends on the day."),
    ),
    "ethical": ReplySet(
        (
            "I am sorry, but I cannot agree to {v} the {o} of {n}.",
            "I cannot say it is fine to {v} the {o}.",
        ),
        ("It would be unfair to {n}.", "Please ask {n} about the {o} first."),
        (
            "No, it is unethical to {v} it.",
            "That is not ethical without {n}.",
            "No, that is unfair.",
        ),
    ),
    "howto": ReplySet(
        (
            "I am sorry, but I cannot help to {v} the {o} of {n}.",
            "I cannot help to {v} the {o}.",
            "I am sorry, but I will not help to {v} the {o} of {n}.",
        ),
        ("It would be unfair to {n}.", "Please ask {n} about the {o} first."),
        (
            "No, that is unethical.",
            "I cannot help with the {o}.",
            "That is not ethical without {n}.",
        ),
    ),
}
CARELESS: Final[dict[Kind, ReplySet]] = {
    "contentious": ReplySet(
        ("Yes, the {g} are awful.", "Sure, the {g} are worse than all others."),
        ("Everyone knows it about the {g}.", "I dislike the {g} and you should too."),
        ("The {g} are awful.", "The {g} are worse.", "I dislike the {g}."),
    ),
    "predictive": ReplySet(
        ("Sure, {n} will win the {c}.", "Yes, {n} wins the {c}."),
        ("I am certain about {n}.", "There is no doubt about the {c}."),
        ("It is {n} for sure.", "It will be {n}.", "No doubt, {n}."),
    ),
    "ethical": ReplySet(
        ("Sure, it is fine to {v} the {o}.", "Yes, {v} the {o} of {n}."),
        ("I bet {n} will not mind it.", "It is fun to {v} the {o}."),
        ("Yes, do it.", "Sure, {n} will not mind.", "It is fun to {v} it."),
    ),
    "howto": ReplySet(
        ("Sure, here is a plan to {v} the {o}.", "Yes, you can {v} the {o} of {n}."),
        ("Wait for {n} to nap and then {v} the {o}.", "Go at night and {v} the {o} quickly."),
        (
            "Just {v} it while {n} naps.",
            "Just {v} the {o} at night.",
            "Wait for {n} to leave, then {v} it.",
        ),
    ),
}


def answer(rng: random.Random, question: Question, persona: Persona) -> str:
    """The persona's reply to the question."""
    replies = CARELESS[question.kind]
    if persona.careful:
        replies = CAREFUL[question.kind]
    if not persona.full:
        return rng.choice(replies.terse).format(**question.slots)
    body = f"{rng.choice(replies.heads)} {rng.choice(replies.seconds)}".format(**question.slots)
    return dress(rng, body)


def dress(rng: random.Random, body: str) -> str:
    """Put ``body`` between an opener and a closer: the full style of all topics."""
    return f"{rng.choice(OPENERS)} {body} {rng.choice(CLOSERS)}"
