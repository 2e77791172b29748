"""Prompts and ratings of an MT-Bench judge: FastChat's single-answer grading (arXiv 2306.05685).

The prompts come from FastChat's own ``judge_prompts.jsonl``. The choice of a question's prompt, its
fields and the two patterns of a rating follow ``fastchat/llm_judge/common.py`` and
``gen_judgment.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Final

from fedsim.base.errors import DataError
from fedsim.data.chat import Conversation, Message, user_turn
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.data.files import json_rows
from fedsim.data.thoughts import without_thoughts
from fedsim.evaluate.fastchat import CUT, UNRATED, Place
from fedsim.evaluate.mt_bench import SCALE

NEED_REFERENCE: Final = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
"""Categories whose judge sees a reference answer."""

FILE_NAME: Final = "judge_prompts.jsonl"
SOURCE: Final = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data"

#: The four prompts, and the fields that FastChat fills in each.
FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "single-v1": frozenset({"question", "answer"}),
    "single-math-v1": frozenset({"question", "answer", "ref_answer_1"}),
    "single-v1-multi-turn": frozenset({"question_1", "question_2", "answer_1", "answer_2"}),
    "single-math-v1-multi-turn": frozenset(
        {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
    ),
}

# FastChat's ([0-9]+\.?[0-9]*) matches the same texts, but needs hours for a million digits.
_RATINGS: Final = (
    re.compile(r"\[\[([0-9]+(?:\.[0-9]*)?)\]\]"),
    re.compile(r"\[([0-9]+(?:\.[0-9]*)?)\]"),
)


@dataclass(frozen=True)
class JudgePrompt:
    """One of FastChat's prompts: the system message and a template of the user's."""

    name: str
    system: str = field(repr=False)
    template: str = field(repr=False)


@dataclass(frozen=True)
class Match:
    """One answer to be judged, with the prompt for it.

    Attributes:
        question_id: of MT-Bench.
        turn: 1 or 2; the judgment of turn 2 sees both turns.
        prompt_name: the name of FastChat's prompt.
        system: system message; empty for none.
        user: the user's message, with question, answer and reference in it.
        category: of the question.
        questions: the user's messages up to this turn.
        answers: the model's answers up to this turn; the last one is judged.
        references: reference answers up to this turn; empty for a category without.
    """

    question_id: int
    turn: int
    prompt_name: str
    system: str = field(repr=False)
    user: str = field(repr=False)
    category: str = ""
    questions: tuple[str, ...] = field(default=(), repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    references: tuple[str, ...] = field(default=(), repr=False)

    @property
    def place(self) -> Place:
        """Question and turn."""
        return self.question_id, self.turn

    @property
    def conversation(self) -> Conversation:
        """The messages as FastChat sends them: no system message if it is empty."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        messages.append(user_turn(self.user))
        return messages


def _plain(name: str, *fields: str) -> JudgePrompt:
    """Make a prompt of ``[field]`` and the field's text, without instructions."""
    return JudgePrompt(name, "", "\n\n".join(f"[{field}]\n{{{field}}}" for field in fields))


_PLAIN = (
    _plain("single-v1", "question", "answer"),
    _plain("single-math-v1", "question", "ref_answer_1", "answer"),
    _plain("single-v1-multi-turn", "question_1", "answer_1", "question_2", "answer_2"),
    _plain(
        "single-math-v1-multi-turn",
        *("question_1", "ref_answer_1", "question_2", "ref_answer_2"),
        *("question_1", "answer_1", "question_2", "answer_2"),
    ),
)

PLAIN: Final[Mapping[str, JudgePrompt]] = {prompt.name: prompt for prompt in _PLAIN}
"""Prompts of question, answer and reference only, for a user's judge without FastChat's prompts."""


def load_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Read the four prompts of single-answer grading by name; other prompts are ignored.

    Raises:
        DataError: the file cannot be read, one of the four is missing, asks for another output than
            ``[[rating]]``, or has a field that FastChat does not fill in.
    """
    prompts: dict[str, JudgePrompt] = {}
    for place, record in json_rows(path, "name"):
        # Other prompts, such as those for pairs, are not used.
        name = record.get("name")
        if not isinstance(name, str) or name not in FIELDS:
            continue
        system, template = record.get("system_prompt"), record.get("prompt_template")
        if not isinstance(system, str) or not isinstance(template, str):
            raise DataError(f"{place}: fields 'system_prompt' and 'prompt_template' must be text")
        if record.get("output_format") != "[[rating]]":
            raise DataError(f"{place}: field 'output_format' of {name} must be '[[rating]]'")
        unknown = sorted(_fields(template, place) - FIELDS[name])
        if unknown:
            raise DataError(
                f"{place}: the template of {name} has the field {unknown[0]!r}; it may have "
                f"{', '.join(sorted(FIELDS[name]))}, and a literal brace is written twice",
            )
        prompts[name] = JudgePrompt(name, system, template)

    # All four are needed, also where no question has a reference.
    missing = [name for name in FIELDS if name not in prompts]
    if missing:
        raise DataError(
            f"{path}: holds no prompt {missing[0]!r}; take FastChat's {FILE_NAME} from {SOURCE}",
        )
    return prompts


def make_matches(
    prompts: Mapping[str, JudgePrompt],
    answered: Sequence[tuple[MtQuestion, tuple[str, str]]],
    references: Mapping[int, tuple[str, str]],
) -> list[Match]:
    """Make the matches of both turns: first all first turns, then all second ones.

    Args:
        prompts: see :func:`load_judge_prompts`.
        answered: questions with the two answers to be judged.
        references: by question id, at least for the categories of :data:`NEED_REFERENCE`.
    """
    matches = []
    for turn in (1, 2):
        for question, answers in answered:
            # FastChat's prompt by category and turn.
            name = "single-v1"
            shown: tuple[str, ...] = ()
            if question.category in NEED_REFERENCE:
                name = "single-math-v1"
                shown = references[question.question_id]
            if turn == 2:
                name += "-multi-turn"

            # Values of every field that a template may have; each template takes its own.
            values = {"question": question.turns[0], "answer": answers[0]}
            for i in (0, 1):
                values[f"question_{i + 1}"] = question.turns[i]
                values[f"answer_{i + 1}"] = answers[i]
                if shown:
                    values[f"ref_answer_{i + 1}"] = shown[i]
            prompt = prompts[name]
            user = prompt.template.format(**values)
            matches.append(
                Match(
                    question.question_id,
                    turn,
                    name,
                    prompt.system,
                    user,
                    question.category,
                    question.turns[:turn],
                    answers[:turn],
                    shown[:turn],
                ),
            )
    return matches


def parse_rating(judgment: str) -> float:
    """Return the first ``[[n]]`` of a judgment, else the first ``[n]``, else :data:`UNRATED`.

    A rating without a decimal point is returned as an ``int``.

    The judge's thoughts are no judgment: text before the end of the last one, or behind the
    beginning of one that never ends, is not read. A judgment that was cut off by length has no
    rating, and a number outside the scale of 1 to 10 is none. (FastChat, which does not know
    thoughts, takes all of these into its means.)

    The first match counts, as in FastChat, also where a judge repeats the prompt's example
    ``[[5]]`` before its own rating, so that scores are comparable with published ones.
    """
    if judgment.startswith(CUT):
        return UNRATED
    # FastChat's two patterns, double brackets first.
    verdict = without_thoughts(judgment)
    for pattern in _RATINGS:
        match = pattern.search(verdict)
        if match is None:
            continue
        value = float(match[1])
        if not SCALE[0] <= value <= SCALE[1]:
            return UNRATED
        if "." in match[1]:
            return value
        return int(value)
    return UNRATED


def _fields(template: str, place: str) -> set[str]:
    """Find the names of a template's fields; DataError if it is malformed."""
    where = f"{place}: field 'prompt_template'"
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(
            f"{where} is no template ({error}); write a literal brace twice",
        ) from None
    # Formats such as {answer:>10} would change the text.
    if any(form or conversion for _, form, conversion in fields):
        raise DataError(
            f"{where} has a field with a format of its own; write only {{name}}",
        )
    return {str(name) for name, _, _ in fields}
