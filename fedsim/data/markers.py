"""Chat markers: the texts that open or close a turn, found for any tokenizer and template, and broken inside content.

A marker is broken by a space after its first character (``< |eot_id|>``), so that content stays readable and can
neither become a special token nor spell what the template writes between turns.
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
    """Breaks given markers in content.

    Args:
        texts: markers of two or more characters; shorter ones cannot be broken and are left out.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(text for text in texts if len(text) > 1)
        tails: dict[str, list[str]] = {}
        for text in sorted(self.texts):
            tails.setdefault(text[0], []).append(re.escape(text[1:]))
        heads = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in tails.items()]
        self._first = re.compile("|".join(heads)) if heads else None

    def break_in(self, text: str) -> str:
        """``text`` without any marker. Only first characters are consumed, so overlapping markers are all broken.

        A space may complete a marker that holds one; the loop breaks it too, and ends because gaps only widen.
        """
        if self._first is None:
            return text
        while (broken := self._first.sub(r"\g<0> ", text)) != text:
            text = broken
        return text


def token_markers(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens, and other added tokens that the chat template writes (DeepSeek's role tokens are not special).

    Further added tokens are texts that a tokenizer happens to know whole, such as runs of spaces or HTML tags.
    """
    template = tokenizer.get_chat_template()
    found = _token_texts(tokenizer, template)
    return found | {normalised(tokenizer, text) for text in found}


def normalised(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` as the tokenizer looks at it where it searches for tokens; most tokenizers change nothing."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return text if normalizer is None else str(normalizer.normalize_str(text))


def _token_texts(tokenizer: PreTrainedTokenizerBase, template: str) -> set[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in template]
    return {*map(str, tokenizer.all_special_tokens), *added, *(text for text in written if _is_marker(text))}


Write = Callable[[Sequence[Any], bool], str]
"""Renders messages, with the assistant header at their end or without; ModelError where the template refuses them."""


def template_markers(write: Write, tokens: Collection[str]) -> set[str]:
    """Markers that a template writes as plain text, such as Llama 2's ``[INST]`` or Alpaca's ``### Response:``.

    They are read off rendered conversations of probes: each line between two messages, without the tokens in it, that
    has both a letter and a sign (``user`` alone is a word). Of what stands before the first message, which may be a
    whole system prompt, only lines without a space count.

    Args:
        write: the template.
        tokens: markers that are known already.

    Raises:
        ModelError: the template refuses a conversation of user, assistant, user.
    """
    user, reply, again = (
        {"role": r, "content": p} for r, p in zip(("user", "assistant", "user"), _PROBES, strict=True)
    )
    found = _between(write([user, reply, again], True), tokens)
    try:
        return found | _between(write([{"role": "system", "content": _PROBES[1]}, user], True), {*tokens, *found})
    except ModelError:  # no system turn, so it has no markers
        return found


def cut_marks(template: str) -> set[str]:
    """Texts at which a template cuts content, such as ``</think>``: the literals that it splits at or looks for."""
    found = [match[2] for pattern in (_CALL, _SEARCH) for match in pattern.finditer(template)]
    return {text for text in found if _is_marker(text)}


def _between(text: str, known: Collection[str]) -> set[str]:
    opening, *frames = re.split("|".join(_PROBES), text)
    lines = {line for frame in frames for line in _lines(frame, known)}
    lines |= {line for line in _lines(opening, known) if not re.search(r"\s", line)}
    return {line for line in lines if _is_marker(line)}


def _lines(text: str, known: Collection[str]) -> list[str]:
    ends = sorted(map(re.escape, known), key=len, reverse=True)
    return [line.strip() for line in re.split("|".join([*ends, "\n"]), text)]


def _is_marker(text: str) -> bool:
    """Return whether ``text`` must be broken in content: it has a letter, and a sign that ordinary words lack."""
    return re.search(r"[^\W\d_]", text) is not None and re.search(r"[^\w\s]", text) is not None and text == text.strip()
