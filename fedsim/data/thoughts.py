"""Separates a model's thoughts from its answer.

A model that thinks first writes its reasoning between two marks and then its answer. Only the answer is rated, scored,
shown to a judge or trained on. Templates get ``enable_thinking=False``, but some models think in any case
(DeepSeek-R1 and its distillations, Qwen3's thinking variants, Magistral), and so may a judge behind an endpoint.
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
    ("<|channel|>analysis<|message|>", "assistantfinal"),  # gpt-oss behind a server that leaves out special tokens
)
"""Marks that open a thought and that end it. Another model's marks are one more line here; case does not matter."""

Thought = Literal["none", "ended", "open"]
"""Thoughts in a reply: none, thoughts that end before the answer, or one that never ends."""

_OPENERS: Final = "|".join(re.escape(opener) for opener in dict.fromkeys(opener for opener, _ in MARKS))
_CLOSERS: Final = "|".join(re.escape(closer) for _, closer in MARKS)
_OPENER: Final = re.compile(_OPENERS, re.IGNORECASE)
_CLOSER: Final = re.compile(_CLOSERS, re.IGNORECASE)
_OPEN_AT_THE_END: Final = re.compile(rf"(?:{_OPENERS})\s*\Z", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """The text behind the last end of a thought, up to the beginning of one that never ends."""
    return _split(text)[0]


def read_reply(text: str, *, opened: bool = False) -> tuple[str, Thought]:
    """The answer in a generated reply, and whether there were thoughts before it.

    A reply has thoughts if it begins with one, if its prompt has opened one, or if it ends one that it has not begun
    (Qwen3 does so now and then). Marks elsewhere are part of an answer, such as one about HTML, and stay.

    Args:
        text: a reply, from the first character that the model wrote.
        opened: the prompt ends with an opened thought (:func:`opens_thought`).
    """
    opener, closer = _OPENER.search(text), _CLOSER.search(text)
    begins = opener is not None and not text[: opener.start()].strip()
    ends_first = closer is not None and (opener is None or closer.start() < opener.start())
    if not (opened or begins or ends_first):
        return text, "none"
    if closer is None:
        return "", "open"
    answer, is_open = _split(text)
    return answer.strip(), "open" if is_open else "ended"


def _split(text: str) -> tuple[str, bool]:
    """The text without thoughts, and whether a thought is open at its end."""
    ends = [match.end() for match in _CLOSER.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    opener = _OPENER.search(rest)
    return (rest, False) if opener is None else (rest[: opener.start()], True)


def opens_thought(prompt: str) -> bool:
    """True if a prompt ends inside a thought, as DeepSeek-R1's template writes it (``<think>\\n``)."""
    return _OPEN_AT_THE_END.search(prompt) is not None
