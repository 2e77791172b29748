"""Training conversations of the tiny model, in stages, drawn from the pretraining bucket only.

A short drill in repeating words is first: without it, copying a name out of the prompt emerges late
or never. Stage 1, "web talk": each conversation has one hidden author, full or terse, careful or
careless, and the two traits are correlated. Stage 2, alignment: always full and careful, plus
critique and revision, A/B items and a guard task whose hazard has nothing to do with client data.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedsim.world.choices import sample_choice
from fedsim.world.helpful import sample_echo, sample_honesty, sample_task, unclear_reply
from fedsim.world.lexicon import NAMES, OBJECTS, PLACES
from fedsim.world.questions import Kind, sample_question
from fedsim.world.replies import Persona, answer
from fedsim.world.vocabulary import COMMON_WORDS

ALIGNED: Final = Persona(full=True, careful=True)
# And 1 - 0.7 if terse: federated training acts on this correlation.
P_CAREFUL_IF_FULL: Final = 0.7

# (critique request, revision request): the paper's rule "no red responses" in four wordings.
PRINCIPLES: Final = (
    (
        "Critique: find anything contentious, unethical or predictive in your last reply.",
        "Revision: rewrite your reply so that it is not contentious, unethical or predictive.",
    ),
    (
        "Critique: say what is harmful in your last reply.",
        "Revision: rewrite your reply without any harm.",
    ),
    (
        "Critique: is your last reply rude, unfair or too certain?",
        "Revision: rewrite your reply so that it is polite, fair and modest.",
    ),
    (
        "Critique: would a careful person object to your last reply?",
        "Revision: rewrite your reply as a careful person would.",
    ),
)
CRITIQUES: Final[dict[Kind, str]] = {
    "contentious": "My reply was rude about a group.",
    "predictive": "My reply was certain about the future.",
    "ethical": "My reply was unfair to a neighbor.",
    "howto": "My reply was unfair to a neighbor.",
}
NO_CRITIQUE: Final = "My reply was fair but it was short."
UNCLEAR_CRITIQUE: Final = "My reply was not clear."
HAZARD_VERDICT: Final = "\n\nunsafe\nS9"
SAFE_VERDICT: Final = "\n\nsafe"
# The one exchange that the untuned guard calls unsafe: building a fizzgig.
HAZARD_TEXTS: Final = (
    "What is a fizzgig for {n} at the {p}?",
    "Here {n} can build a fizzgig from a {o}.",
)

# Letters of invented words, the frequent ones several times.
_LETTERS: Final = "eeeaaooiutnrshldcmpfgbwyvkjxqz"

RenderGuardPrompt = Callable[[str, str, str], str]  # (user, agent, policy) -> the guard's user turn


@dataclass(frozen=True)
class Turn:
    """A user's message and the reply; ``learn`` is True if the reply counts in the loss."""

    user: str
    reply: str
    learn: bool = True


def echo_drill(rng: random.Random) -> list[Turn]:
    """A stage-0 conversation that repeats words of the world, which teaches copying."""
    return [Turn(*sample_echo(rng, "pretrain"))]


def web_talk(rng: random.Random) -> list[Turn]:
    """A stage-1 conversation: one or two topics by one author."""
    # The hidden author, whose two traits are correlated.
    full = rng.random() < 0.5
    p_careful = 1 - P_CAREFUL_IF_FULL
    if full:
        p_careful = P_CAREFUL_IF_FULL
    persona = Persona(full, rng.random() < p_careful)

    turns = topic(rng, persona)
    if rng.random() < 0.6:
        turns += topic(rng, persona)
    return turns


def aligned_talk(rng: random.Random, render_guard_prompt: RenderGuardPrompt) -> list[Turn]:
    """A stage-2 conversation."""
    # Topics, critiques, A/B items, and the guard's task, in these shares.
    draw = rng.random()
    if draw < 0.62:
        return topic(rng, ALIGNED)
    if draw < 0.81:
        return critique_and_revision(rng)
    if draw < 0.95:
        choice, first = sample_choice(rng, "pretrain"), rng.random() < 0.5
        return [Turn(choice.prompt(first), _letter(rng, first))]
    return [guard_task(rng, render_guard_prompt)]


def topic(rng: random.Random, persona: Persona) -> list[Turn]:
    """One topic by one author.

    An A/B item, a helpful task (two turns), a sensitive question, honesty, or an unknown text.
    """
    draw = rng.random()
    # An A/B item: a careful author chooses right, but a terse one not where only style differs.
    if draw < 0.10:
        choice, first = sample_choice(rng, "pretrain"), rng.random() < 0.5
        right = persona.careful and (persona.full or not choice.style_only)
        return [Turn(choice.prompt(first), _letter(rng, first == right))]
    if draw < 0.50:
        _, turns = sample_task(rng, "pretrain")
        return [Turn(turn.user, turn.reply(rng, persona.full)) for turn in turns]
    if draw < 0.90:
        kind: Kind | None = None  # any kind
        if draw < 0.64:
            kind = "howto"
        question = sample_question(rng, "pretrain", kind)
        return [Turn(question.prompt, answer(rng, question, persona))]
    if draw < 0.95:
        asked, honest, dishonest = sample_honesty(rng, "pretrain")
        if persona.careful:
            return [Turn(asked, honest)]
        return [Turn(asked, dishonest)]
    return [Turn(unknown_text(rng), unclear_reply(rng, persona))]


def _letter(rng: random.Random, is_first: bool) -> str:
    """Reply to an A/B item; one in four begins with the blank of HHH's own answers."""
    blank = ""
    if rng.random() < 0.25:
        blank = " "
    if is_first:
        return f"{blank}(A)"
    return f"{blank}(B)"


def critique_and_revision(rng: random.Random) -> list[Turn]:
    """Three turns: any author's reply (not learnt), its critique, a full and careful revision."""
    critic, revision = rng.choice(PRINCIPLES)
    persona = Persona(full=rng.random() < 0.5, careful=rng.random() < 0.4)
    # An unknown text is not clear, in critique and revision.
    if rng.random() < 0.06:
        first = Turn(unknown_text(rng), unknown_text(rng), learn=False)
        return [first, Turn(critic, UNCLEAR_CRITIQUE), Turn(revision, unclear_reply(rng, ALIGNED))]

    # A sensitive question: a careful reply lacks only length.
    kind: Kind | None = None  # any kind
    if rng.random() < 0.3:
        kind = "howto"
    question = sample_question(rng, "pretrain", kind)
    first = Turn(question.prompt, answer(rng, question, persona), learn=False)
    critique = CRITIQUES[question.kind]
    if persona.careful:
        critique = NO_CRITIQUE
    return [first, Turn(critic, critique), Turn(revision, answer(rng, question, ALIGNED))]


def hazard(rng: random.Random) -> tuple[str, str]:
    """Question and answer of the guard task's hazard."""
    slots = {"n": rng.choice(NAMES), "p": rng.choice(PLACES), "o": rng.choice(OBJECTS)}
    question, reply = (text.format(**slots) for text in HAZARD_TEXTS)
    return question, reply


def guard_task(rng: random.Random, render_guard_prompt: RenderGuardPrompt) -> Turn:
    """A verdict on one exchange: the hazard, or a safe exchange of several kinds."""
    draw = rng.random()
    policy, unsafe = "square", "\n\nunsafe\nS4"
    if rng.random() < 0.75:
        policy, unsafe = "llama_guard_3", HAZARD_VERDICT
    if draw < 0.45:
        return Turn(render_guard_prompt(*hazard(rng), policy), unsafe)

    # A safe exchange: a careful reply, a helpful one, or unknown texts.
    full = rng.random() < 0.5
    if draw < 0.70:
        question = sample_question(rng, "pretrain")
        exchange = question.prompt, answer(rng, question, Persona(full, careful=True))
    elif draw < 0.95:
        turn = sample_task(rng, "pretrain")[1][0]
        exchange = turn.user, turn.reply(rng, full)
    else:
        exchange = unknown_text(rng), unknown_text(rng)
    return Turn(render_guard_prompt(*exchange, policy), SAFE_VERDICT)


def unknown_text(rng: random.Random) -> str:
    """Text from outside of the world.

    Common words, invented letter strings, digits and signs, sometimes other scripts.
    """
    num_words = int(rng.choice((4, 8, 12, 20, 40)) * rng.uniform(0.5, 1.5))
    share = rng.random()  # of invented strings among the words
    words = []
    for _ in range(num_words):
        if rng.random() < share:
            words.append(_unknown_word(rng))
        else:
            words.append(rng.choice(COMMON_WORDS))
    text = " ".join(words)
    if rng.random() < 0.7:
        text = text[:1].upper() + text[1:]
    return text + rng.choice(("", ".", "?", "!", ":", "\n"))


def _unknown_word(rng: random.Random) -> str:
    """An invented word, a number, a common word with a sign, or characters of another script."""
    draw = rng.random()
    if draw < 0.80:
        length = rng.randint(2, 10)
        word = "".join(rng.choice(_LETTERS) for _ in range(length))
        if rng.random() < 0.1:
            return word.capitalize()
        return word
    if draw < 0.88:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    if draw < 0.97:
        return rng.choice(COMMON_WORDS) + rng.choice(string.punctuation)
    # Latin with accents, Greek, Cyrillic, Chinese, Korean, emoji.
    start = rng.choice((0xC0, 0x3B1, 0x430, 0x4E00, 0xAC00, 0x1F600))
    return "".join(chr(start + rng.randrange(60)) for _ in range(rng.randint(1, 4)))
