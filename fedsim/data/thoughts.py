"""Separation of a model's thoughts from its answer.

A model that thinks first writes its reasoning between two marks and then its answer. Only the
answer is scored, shown to a judge or trained on. Templates get ``enable_thinking=False``, but some
models still think (DeepSeek-R1 and its distillations, Qwen3's thinking variants, Magistral), and so
may a judge behind an endpoint.
"""

from __future__ import annotations

import re
from typing import Final, Literal

MARKS: Final[tuple[tuple[str, str], ...]] = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, GLM, MiniMax, Nemotron, OLMo 3
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    (
        "<|channel|>analysis<|message|>",
        "assistantfinal",
    ),  # gpt-oss behind a server that leaves out special tokens
)
"""Marks that open and end a thought, in any case; a line for each kind of model."""

Thought = Literal["none", "ended", "open"]
"""Thoughts in a reply: none, ended before the answer, or never ended."""

_OPENERS: Final = "|".join(dict.fromkeys(re.escape(opener) for opener, _ in MARKS))
_CLOSERS: Final = "|".join(re.escape(closer) for _, closer in MARKS)
_OPENER: Final = re.compile(_OPENERS, re.IGNORECASE)
_CLOSER: Final = re.compile(_CLOSERS, re.IGNORECASE)
_OPEN_AT_THE_END: Final = re.compile(rf"(?:{_OPENERS})\s*\Z", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """Text behind the last end of a thought, up to the start of one that never ends."""
    return _split(text)[0]


def read_reply(text: str, *, opened: bool = False) -> tuple[str, Thought]:
    """Read the answer in a generated reply, and the kind of thoughts before it.

    A reply has thoughts if it begins with one, if its prompt has opened one, or if it ends one that
    it has not begun (Qwen3 does so now and then). Marks elsewhere are part of an answer, such as
    one about HTML, and stay.

    Args:
        text: a reply, from its first generated character.
        opened: the prompt ends with an opened thought (:func:`opens_thought`).
    """
    # Are there thoughts at all?
    opener, closer = _OPENER.search(text), _CLOSER.search(text)
    begins = opener is not None and not text[: opener.start()].strip()
    ends_first = closer is not None and (opener is None or closer.start() < opener.start())
    if not (opened or begins or ends_first):
        return text, "none"
    if closer is None:
        return "", "open"
    answer, is_open = _split(text)
    if is_open:
        return answer.strip(), "open"
    return answer.strip(), "ended"


def _split(text: str) -> tuple[str, bool]:
    """Text without thoughts, and whether a thought is open at its end."""
    rest = text
    for match in _CLOSER.finditer(text):
        rest = text[match.end() :]
    opener = _OPENER.search(rest)
    if opener is None:
        return rest, False
    return rest[: opener.start()], True


def opens_thought(prompt: str) -> bool:
    """True if a prompt ends inside a thought, as DeepSeek-R1's does (``<think>\\n``)."""
    return _OPEN_AT_THE_END.search(prompt) is not None
