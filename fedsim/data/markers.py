"""Chat markers (texts that open or close a turn), found for any template and broken in content.

A marker is broken by a space after its first character (``< |eot_id|>``), so that content stays
readable and can neither become a special token nor spell what the template writes between turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from fedsim.base.errors import ModelError

_PROBES: Final = ("PROBE0", "PROBE1", "PROBE2")
_CALL: Final = re.compile(r"""\b(?:split|startswith|endswith|find)\(\s*(['"])([^'"\n]+)\1""")
_SEARCH: Final = re.compile(r"""(['"])([^'"\n]+)\1\s+(?:not\s+)?in\b""")


class Markers:
    """Patterns that break given markers in content.

    Args:
        texts: markers of two or more characters; shorter ones cannot be broken and are left out.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(text for text in texts if len(text) > 1)
        # One pattern: a marker's first character, followed by the rest of any marker.
        tails: dict[str, list[str]] = {}
        for text in sorted(self.texts):
            tails.setdefault(text[0], []).append(re.escape(text[1:]))
        heads = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in tails.items()]
        self._first: re.Pattern[str] | None = None
        if heads:
            self._first = re.compile("|".join(heads))

    def break_in(self, text: str) -> str:
        """``text`` without any marker.

        Only first characters are consumed, so overlapping markers are all broken. A space may
        complete a marker that holds one; the loop breaks it too, and ends because gaps only widen.
        """
        if self._first is None:
            return text
        while True:
            broken = self._first.sub(r"\g<0> ", text)
            if broken == text:
                return text
            text = broken


def token_markers(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens, and other added tokens that the chat template writes.

    DeepSeek's role tokens are not special. Further added tokens are ordinary texts, such as runs of
    spaces or HTML tags.
    """
    template = tokenizer.get_chat_template()
    found = _token_texts(tokenizer, template)
    return found | {normalised(tokenizer, text) for text in found}


def normalised(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` after the tokenizer's normalisation; most tokenizers change nothing."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return text
    return str(normalizer.normalize_str(text))


def _token_texts(tokenizer: PreTrainedTokenizerBase, template: str) -> set[str]:
    """Texts of special tokens, and of added tokens in the template that look like markers."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token)
        if token.special or (text in template and _is_marker(text)):
            found.add(text)
    return found


Write = Callable[[Sequence[Any], bool], str]
"""Renders messages, with the assistant header or without; ModelError if the template cannot."""


def template_markers(write: Write, tokens: Collection[str]) -> set[str]:
    """Markers that a template writes as plain text, such as Llama 2's ``[INST]``.

    They are read off rendered probes: each line between two messages, without the tokens in it,
    that has both a letter and a sign (``user`` is only a word). Before the first message, where a
    whole system prompt may be, only lines without a space count.

    Args:
        write: the template.
        tokens: markers that are known already.

    Raises:
        ModelError: the template refuses a conversation of user, assistant, user.
    """
    user = {"role": "user", "content": _PROBES[0]}
    reply = {"role": "assistant", "content": _PROBES[1]}
    again = {"role": "user", "content": _PROBES[2]}
    found = _between(write([user, reply, again], True), tokens)

    # A system turn may have markers of its own.
    system = {"role": "system", "content": _PROBES[1]}
    try:
        return found | _between(write([system, user], True), {*tokens, *found})
    except ModelError:  # the template has no system turn
        return found


def cut_marks(template: str) -> set[str]:
    """Literals at which a template cuts content, such as ``</think>``: split at or searched for."""
    found = [match[2] for match in _CALL.finditer(template)]
    found += [match[2] for match in _SEARCH.finditer(template)]
    return {text for text in found if _is_marker(text)}


def _between(text: str, known: Collection[str]) -> set[str]:
    """Markers among the lines before, between and after the probes of a rendered text."""
    opening, *frames = re.split("|".join(_PROBES), text)
    lines = {line for line in _lines(opening, known) if not re.search(r"\s", line)}
    for frame in frames:
        lines.update(_lines(frame, known))
    return {line for line in lines if _is_marker(line)}


def _lines(text: str, known: Collection[str]) -> list[str]:
    """Stripped lines of a text, split at known markers too, the longest of them first."""
    ends = sorted(map(re.escape, known), key=len, reverse=True)
    return [line.strip() for line in re.split("|".join([*ends, "\n"]), text)]


def _is_marker(text: str) -> bool:
    """True if ``text`` must be broken in content: it has a letter and a sign, which words lack."""
    has_letter = re.search(r"[^\W\d_]", text) is not None
    has_sign = re.search(r"[^\w\s]", text) is not None
    return has_letter and has_sign and text == text.strip()
