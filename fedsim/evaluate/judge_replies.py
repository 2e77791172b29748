"""Classification of an endpoint's answers: a judgment, a temporary or a permanent failure.

An endpoint may echo the prompt in its error. Its free text is therefore not shown: only the status,
and names such as ``context_length_exceeded`` that do not occur in the prompt. The argument
``hidden`` of these functions is the prompt and the key.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fedsim.evaluate.fastchat import CUT

if TYPE_CHECKING:
    from openai import APIStatusError

_SHOWN_REASONS: Final = ("stop", "length", "content_filter", "tool_calls", "function_call")
"""OpenAI's own finish reasons; another one may be a word of the prompt."""

_CUT_REASONS: Final = ("length", "max_tokens", "content_filter", "abort")
"""Finish reasons of a judgment that is not whole, of OpenAI, vLLM, SGLang and others."""

_TEXT_PARTS: Final = (None, "text", "output_text")
"""Types of the content parts of the answer; others, such as "reasoning", hold thoughts."""

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_TOO_LONG: Final = re.compile(
    r"context (length|window|size)|maximum context|max_model_len|too long|too many tokens",
)
_UNSUPPORTED: Final = re.compile(r"unsupported|not support|only the default")


class UnusableError(Exception):
    """An answer without a judgment. The message is without the key or any text of a prompt."""


class TurnError(Exception):
    """A turn without a judgment, while others may get one.

    The message is without the key or any text of a prompt.
    """


def content(body: bytes) -> str:
    """Read the text of a chat completion.

    A text that is not whole gets :data:`fedsim.evaluate.fastchat.CUT` before it.

    The content may be a list of parts, of which those with text are taken. Thoughts that an
    endpoint gives apart from the content (``reasoning_content``) are not read. An answer that
    reached its length limit before any text is cut off too: the same request would end there again.

    Args:
        body: of the answer, JSON.

    Raises:
        UnusableError: it is no JSON, or has no choice or no text.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"the answer is no chat completion ({type(error).__name__})") from None

    # The first choice's content: a text, or a list of parts.
    choices = _get(reply, "choices")
    if not isinstance(choices, list) or not choices:
        raise UnusableError("the answer has no choices")
    found = _get(_get(choices[0], "message"), "content")
    if isinstance(found, list):
        found = "".join(_part_text(part) for part in found)
    text = ""
    if isinstance(found, str) and found.strip():
        text = found

    # An answer without text is unusable, unless it reached its length limit before any text.
    reason = _get(choices[0], "finish_reason")
    if not text and reason not in ("length", "max_tokens"):
        shown = ""
        if reason in _SHOWN_REASONS:
            shown = f" (finish_reason {reason})"
        raise UnusableError(f"the answer has no text{shown}")

    # Half of a surrogate pair is valid JSON, but cannot be written to a file.
    text = text.encode("utf-8", "replace").decode()
    if reason in _CUT_REASONS:
        return f"{CUT}{text}"
    return text


def _get(found: Any, key: str) -> Any:
    """Value of an object's key; None if there is none, or ``found`` is no object."""
    if not isinstance(found, dict):
        return None
    return found.get(key)


def _part_text(part: Any) -> str:
    """The text of a content part; empty if it is of another type than text."""
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
        return ""
    text = part.get("text")
    if not isinstance(text, str):
        return ""
    return text


def may_pass(status: int, body: bytes) -> bool:
    """Return whether the same request may succeed later.

    It may after 408, 409, 429 and 5xx, unless no quota is left.

    Args:
        status: of an HTTP answer.
        body: of the answer. A JSON string that only quotes the words has its quotation marks
            escaped, so that it does not match.
    """
    return (status in (408, 409, 429) or status >= 500) and b'"insufficient_quota"' not in body


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read the seconds to wait from a ``Retry-After`` header; None without a valid one.

    The header holds seconds or a date.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        # A number of seconds, or else a date.
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    if not math.isfinite(seconds):
        return None
    return max(0.0, seconds)


def status_text(error: APIStatusError, hidden: str) -> str:
    """Describe an error by its status and names: ``HTTP 400 (invalid_request_error, messages)``."""
    # Names that differ, in the order code, type, parameter.
    names = [_name(value, hidden) for value in (error.code, error.type, error.param)]
    shown = [name for name in dict.fromkeys(names) if name]
    if _TOO_LONG.search(_message(error)):
        shown.append("the request does not fit into the judge's context")
    if not shown:
        return f"HTTP {error.status_code}"
    return f"HTTP {error.status_code} ({', '.join(shown)})"


def wants_other_limit(error: APIStatusError, hidden: str) -> bool:
    """Return whether the endpoint asks for ``max_completion_tokens`` instead of ``max_tokens``."""
    unsupported = error.param == "max_tokens" and "unsupported" in str(error.code)
    return unsupported or _mentions(error, hidden, "max_completion_tokens")


def refuses_temperature(error: APIStatusError, hidden: str) -> bool:
    """Return whether the endpoint refuses ``temperature=0``."""
    unsupported = _UNSUPPORTED.search(_message(error)) is not None
    return error.param == "temperature" or (unsupported and _mentions(error, hidden, "temperature"))


def cause(error: BaseException) -> str:
    """Return the reason of a failed connection: the system's text, or else the error's type.

    The text of other errors is not used, as it may hold parts of the answer.
    """
    # The error and its causes, the innermost last.
    chain, inner = [error], error.__cause__ or error.__context__
    while inner is not None:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    said = [link.strerror for link in chain if isinstance(link, OSError) and link.strerror]
    if said:
        return said[-1]
    return type(chain[min(1, len(chain) - 1)]).__name__


def _mentions(error: APIStatusError, hidden: str, parameter: str) -> bool:
    """Return whether the message names a parameter that does not occur in the prompt."""
    return parameter in _message(error) and parameter not in hidden.lower()


def _message(error: APIStatusError) -> str:
    """Message in the error's body, in lower case; empty if it is not of OpenAI's form.

    It must not be shown.
    """
    said = _get(error.body, "message")
    if not isinstance(said, str):
        return ""
    return said.lower()


def _name(value: object, hidden: str) -> str:
    """Return the value if it is a name without any text of ``hidden``, else an empty text.

    Neither may it occur in ``hidden`` nor contain one of its words of 12 characters or more.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in hidden:
        return ""
    if any(len(word) >= 12 and word in value for word in hidden.split()):
        return ""
    return value
