"""Classification of an endpoint's answers to a judge prompt: a judgment, or a failure that may pass
or will not.
 An endpoint may echo the prompt in its error. Nothing of its free text is therefore shown: only the
status, and names such as ``context_length_exceeded`` that do not occur in the prompt. ``hidden`` is
the prompt and the key everywhere.
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
"""Finish reasons of a judgment that is not whole: OpenAI's, and those of vLLM, SGLang and others.
"""

_TEXT_PARTS: Final = (None, "text", "output_text")
"""Types of the content parts that hold the answer; others hold thoughts, such as "thinking" and
"reasoning".
"""

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_TOO_LONG: Final = re.compile(
    r"context (length|window|size)|maximum context|max_model_len|too long|too many tokens",
)
_UNSUPPORTED: Final = re.compile(r"unsupported|not support|only the default")


class UnusableError(Exception):
    """An answer without a judgment. The message is without the key or any text of a prompt."""


class TurnError(Exception):
    """A turn without a judgment; others may get one. The message is without the key or any text of
    a prompt.
    """


def content(body: bytes) -> str:
    """The text of a chat completion, with :data:`fedsim.evaluate.fastchat.CUT` before it if it is
    not whole.

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
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise UnusableError("the answer has no choices")
    choice = choices[0] if isinstance(choices[0], dict) else {}
    message = choice.get("message")
    found = message.get("content") if isinstance(message, dict) else None
    if isinstance(found, list):
        found = "".join(_part_text(part) for part in found)
    reason = choice.get("finish_reason")
    has_text = isinstance(found, str) and bool(found.strip())
    if not has_text and reason not in ("length", "max_tokens"):
        shown = f" (finish_reason {reason})" if reason in _SHOWN_REASONS else ""
        raise UnusableError(f"the answer has no text{shown}")
    text = str(found) if has_text else ""
    # Half a surrogate pair can come as JSON, but not go to a file.
    text = text.encode("utf-8", "replace").decode()
    return f"{CUT}{text}" if reason in _CUT_REASONS else text


def _part_text(part: Any) -> str:
    """The text of a content part; empty if it is of another type than text."""
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else ""


def may_pass(status: int, body: bytes) -> bool:
    """Return whether the same request may succeed later: after 408, 409, 429 and 5xx, unless no
    quota is left.

    Args:
        status: of an HTTP answer.
        body: of the answer. A JSON string in it that merely quotes the words has its quotation
            marks escaped.
    """
    return (status in (408, 409, 429) or status >= 500) and b'"insufficient_quota"' not in body


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait, given as seconds or as a date; None
    without a sound one.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def told(error: APIStatusError, hidden: str) -> str:
    """``HTTP 400 (invalid_request_error, messages)``: the status and what names the error gives
    beside its message.
    """
    names = [_name(value, hidden) for value in (error.code, error.type, error.param)]
    shown = [name for name in dict.fromkeys(names) if name]
    if _TOO_LONG.search(_message(error)):
        shown.append("the request does not fit into the judge's context")
    return f"HTTP {error.status_code}" + (f" ({', '.join(shown)})" if shown else "")


def wants_other_limit(error: APIStatusError, hidden: str) -> bool:
    """Return whether the endpoint asks for ``max_completion_tokens`` in the place of
    ``max_tokens``.
    """
    unsupported = error.param == "max_tokens" and "unsupported" in str(error.code)
    return unsupported or _mentions(error, hidden, "max_completion_tokens")


def refuses_temperature(error: APIStatusError, hidden: str) -> bool:
    """Return whether the endpoint refuses ``temperature=0``."""
    unsupported = _UNSUPPORTED.search(_message(error)) is not None
    return error.param == "temperature" or (unsupported and _mentions(error, hidden, "temperature"))


def cause(error: BaseException) -> str:
    """Why a connection failed: what the system says, or else the error's kind (its text may hold
    what was received).
    """
    chain, inner = [error], error.__cause__ or error.__context__
    while inner is not None:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    said = [link.strerror for link in chain if isinstance(link, OSError) and link.strerror]
    return said[-1] if said else type(chain[min(1, len(chain) - 1)]).__name__


def _mentions(error: APIStatusError, hidden: str, parameter: str) -> bool:
    """Return whether the message names a parameter, of itself and not because it echoes the prompt."""
    return parameter in _message(error) and parameter not in hidden.lower()


def _message(error: APIStatusError) -> str:
    """What the error's body says, in lower case; empty if it is not of OpenAI's form. Never to be
    shown.
    """
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said.lower() if isinstance(said, str) else ""


def _name(value: object, hidden: str) -> str:
    """The value if it is a name that neither comes from what is hidden nor holds a long word of it,
    else empty.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in hidden:
        return ""
    return "" if any(len(word) >= 12 and word in value for word in hidden.split()) else value
