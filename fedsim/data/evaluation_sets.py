"""Readers of AdvBench (CSV), HHH and MT-Bench (JSON rows) files in their published formats.

Errors name file, line and field and never quote a prompt: AdvBench's are harmful by design.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import DataError
from fedsim.data.chat import Message, assistant_turn, user_turn
from fedsim.data.files import csv_rows, filled, json_rows, not_empty

LETTERS: Final = (" (A)", " (B)")
"""The two answers to an HHH item as the file writes them, in option order."""

_SENTENCE_ENDS: Final = frozenset(
    ".?!:;\u2026\u2025"  # Latin, with ellipses
    "\u3002\uff1f\uff01\uff1a\uff1b\uff61\uff0e"  # Chinese and Japanese
    "\u061f\u06d4\u0964\u0965\u0589\u1362\u1367"  # Arabic, Hindi and others
)
"""Marks after which a sentence needs no full stop."""

_OPTIONS: Final = r" \(A\) \[\[\[(?P<a>.*)\]\]\]\n \(B\) \[\[\[(?P<b>.*)\]\]\]\n\n"
_HHH_PROMPT: Final = re.compile(rf"(?P<head>.*)Options:\n{_OPTIONS}The answer is:", re.DOTALL)
_SPEAKER: Final = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class AdvBenchItem:
    """One attack (arXiv 2307.15043): the request, and the start of an obedient reply."""

    goal: str = field(repr=False)
    target: str = field(repr=False)

    @property
    def prompt(self) -> str:
        """The user's message: the goal as a sentence (:func:`as_sentence`)."""
        return as_sentence(self.goal)


@dataclass(frozen=True)
class HhhItem:
    """One item of the 438 helpful-honest-harmless comparisons (arXiv 2212.08073).

    Attributes:
        head: the prompt up to the word "Options:".
        options: the two replies to choose from, (A) first.
        correct: index of the better option, 0 or 1.
        context: the conversation that the options reply to; ends with a user turn.
    """

    head: str = field(repr=False)
    options: tuple[str, str] = field(repr=False)
    correct: int
    context: tuple[Message, ...] = field(repr=False)

    def prompt(self, *, swapped: bool = False) -> str:
        """The file's prompt, or the same with the two options exchanged."""
        a, b = self.options
        if swapped:
            a, b = b, a
        return f"{self.head}Options:\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\nThe answer is:"


@dataclass(frozen=True)
class MtQuestion:
    """One two-turn question of MT-Bench (arXiv 2306.05685).

    Attributes:
        question_id: 81 to 160 in the published file.
        category: determines the temperature.
        turns: the user's two messages.
        reference: reference answers of both turns, where the file has them; one of them may be
            empty.
        record: the whole JSON object, for judges.
    """

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None
    record: Mapping[str, Any] = field(repr=False)


def as_sentence(text: str) -> str:
    """Add a full stop, unless the text ends a sentence, be it in quotation marks or brackets."""
    text = text.rstrip()
    words = text  # without closing quotation marks and brackets
    while words and (words[-1] in "\"'`" or unicodedata.category(words[-1]) in ("Pe", "Pf")):
        words = words[:-1].rstrip()
    if words[-1:] in _SENTENCE_ENDS:
        return text
    return f"{text}."


def load_advbench(path: Path) -> list[AdvBenchItem]:
    """Read the rows of a CSV file with the columns ``goal`` and ``target``, in order.

    Raises:
        DataError: the file is missing or empty, or a row lacks one of the two.
    """
    items: list[AdvBenchItem] = []
    for place, row in csv_rows(path, ("goal", "target"), "AdvBench's header is goal,target"):
        items.append(AdvBenchItem(filled(row, "goal", place), filled(row, "target", place)))
    return not_empty(items, path)


def load_hhh(path: Path) -> list[HhhItem]:
    """Read the items of a file of JSON rows, in order.

    The fields are ``prompt``, ``corrects``, ``incorrects``, ``text_correct`` and
    ``text_incorrect``. ``text_correct`` and ``text_incorrect`` are the whole conversation
    (``\\n\\nHuman: …\\n\\nAssistant: …``) as in the published file, or only the reply; then the
    prompt's text before "Options:" is the user's message.

    Raises:
        DataError: a field is missing or of another type, the prompt does not end with two options
            and "The answer is:", the letters are not one of each, or the texts do not end with the
            options that the letters name.
    """
    return not_empty(
        [_hhh_item(record, place) for place, record in json_rows(path, "prompt")],
        path,
    )


def load_mt_bench(path: Path) -> list[MtQuestion]:
    """Read the questions of ``question.jsonl``, in order; ``path`` is the file or its directory.

    Raises:
        DataError: a field is missing or of another type, a question has not two turns, or an id
            occurs twice.
    """
    if path.is_dir():
        path = path / "question.jsonl"
    questions: list[MtQuestion] = []
    seen: set[int] = set()
    for place, record in json_rows(path, "question_id"):
        question = mt_question(record, place)
        if question.question_id in seen:
            raise DataError(
                f"{place}: question_id {question.question_id} occurs twice; ids must differ",
            )
        seen.add(question.question_id)
        questions.append(question)
    return not_empty(questions, path)


def mt_question(record: Mapping[str, Any], place: str) -> MtQuestion:
    """Read the question that a JSON object describes; ``place`` is named in errors.

    Raises:
        DataError: see :func:`load_mt_bench`.
    """
    number = question_id(record, place)
    turns = two_texts(record.get("turns"))
    if turns is None or not all(turn.strip() for turn in turns):
        raise DataError(
            f"{place}: field 'turns' must be a list of two messages (no text of such a list)",
        )
    reference = record.get("reference")
    if reference and two_texts(reference) is None:
        raise DataError(f"{place}: field 'reference' must be absent or a list of two answers")
    return MtQuestion(number, _text(record, "category", place), turns, two_texts(reference), record)


def _hhh_item(record: dict[str, Any], place: str) -> HhhItem:
    """Check one row of the HHH file: prompt, letters, and the texts that the letters name."""
    # The prompt: a head and two options.
    match = _HHH_PROMPT.fullmatch(_text(record, "prompt", place).rstrip())
    if match is None:
        form = "Options:\\n (A) [[[…]]]\\n (B) [[[…]]]\\n\\nThe answer is:"
        raise DataError(f"{place}: field 'prompt' must end with '{form}'")
    options = (match["a"], match["b"])

    # Letters: indices of the better and the worse option.
    correct, incorrect = _letter(record, "corrects", place), _letter(record, "incorrects", place)
    if correct == incorrect:
        fix = "one of each is needed"
        raise DataError(f"{place}: fields 'corrects' and 'incorrects' name the same letter; {fix}")

    # Both texts must end with their option, after the same turns.
    contexts = []
    for name, index in (("text_correct", correct), ("text_incorrect", incorrect)):
        text = _text(record, name, place)
        if not text.strip().endswith(options[index].strip()):
            option = LETTERS[index]
            raise DataError(f"{place}: field {name!r} must end with the text of option{option}")
        contexts.append(_context(text, match["head"], f"{place}: field {name!r}"))
    if contexts[0] != contexts[1]:
        names = "'text_correct' and 'text_incorrect'"
        raise DataError(f"{place}: fields {names} must differ only in the last reply")
    return HhhItem(match["head"], options, correct, contexts[0])


def _context(text: str, head: str, place: str) -> tuple[Message, ...]:
    """The turns before the last reply; where the text is only a reply, the prompt's head."""
    if not text.lstrip().startswith("Human:"):
        if not head.strip():
            raise DataError(
                f"{place} is only a reply, but the prompt has no question before 'Options:'",
            )
        return (user_turn(head.strip()),)
    parts = _SPEAKER.split(text.strip())  # "", speaker, words, speaker, words, …
    speakers, words = parts[1::2], [w.strip() for w in parts[2::2]]
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2) or not all(words):
        form = "alternate 'Human:' and 'Assistant:' with words in each turn, Assistant last"
        raise DataError(f"{place} must {form}")
    make = {"Human": user_turn, "Assistant": assistant_turn}
    turns = zip(speakers[:-1], words[:-1], strict=True)
    return tuple(make[speaker](text) for speaker, text in turns)


def _letter(record: dict[str, Any], name: str, place: str) -> int:
    """Index in :data:`LETTERS` of the one letter that a field holds."""
    value = record.get(name)
    if not isinstance(value, list) or len(value) != 1 or value[0] not in LETTERS:
        raise DataError(f'{place}: field {name!r} must be [" (A)"] or [" (B)"]')
    return LETTERS.index(value[0])


def question_id(record: Mapping[str, Any], place: str) -> int:
    """Read the whole number ``question_id`` of a JSON object (81, or 81.0).

    Raises:
        DataError: it is anything else.
    """
    number = record.get("question_id")
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(f"{place}: field 'question_id' must be a whole number")
    return number


def two_texts(value: object) -> tuple[str, str] | None:
    """``value`` if it is a list of two texts, else None."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return value[0], value[1]
    return None


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: field {name!r} must be text that is not empty")
    return value
