"""Asks an OpenAI-compatible endpoint for judgments, and waits and asks again where a failure may pass.

The key is taken from ``OPENAI_API_KEY`` alone and never shown. Back-off grows from 1 s to 60 s, with jitter; a
``Retry-After`` is honoured up to 5 minutes.
"""

from __future__ import annotations

import email.utils
import math
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from fedsim import keys
from fedsim.config import JudgeConfig
from fedsim.errors import ConfigError, JudgeError
from fedsim.evaluate.judge_prompts import Match

if TYPE_CHECKING:
    from openai import APIStatusError

OPENAI_URL: Final = "https://api.openai.com/v1"
KEY_VARIABLE: Final = "OPENAI_API_KEY"
NO_KEY: Final = "EMPTY"
"""Sent to an endpoint of one's own that asks for no key, as users of vLLM do."""

FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 60.0
LONGEST_RETRY_AFTER_S: Final = 300.0

Pause = Callable[[float], bool]
"""Waits so many seconds; True if the work was given up meanwhile."""


class PassingError(Exception):
    """A failure that may pass.

    Args:
        reason: without the key or any text of a prompt.
        retry_after_s: how long the endpoint asks to wait; None if it does not say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class StoppedError(Exception):
    """The work was given up while a request waited for its next attempt."""


def check_client(settings: JudgeConfig) -> None:
    """Find out without a request whether the endpoint could be asked.

    Raises:
        ConfigError: the ``openai`` package or the key is missing, or ``judge.base_url`` is no address.
    """
    if find_spec("openai") is None:
        raise ConfigError("judge.kind=openai needs the openai package: pip install 'fedsim[judge]'")
    if settings.base_url and not settings.base_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"judge.base_url={settings.base_url!r}: must begin with http:// or https://, such as "
            "http://localhost:8000/v1"
        )
    key = _key()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE}: holds a character that no key has; export it anew")
    if not settings.base_url and not key:
        raise ConfigError(
            f"judge.kind=openai needs a key: export {KEY_VARIABLE}, or set judge.base_url to an endpoint of your own"
        )


class OpenAiClient:
    """One endpoint and model; may be used by several threads at once.

    Args:
        settings: see :class:`fedsim.config.JudgeConfig`.

    Raises:
        ConfigError: see :func:`check_client`.
    """

    def __init__(self, settings: JudgeConfig) -> None:
        check_client(settings)
        import openai

        self.settings = settings
        self._errors = openai
        self._key = _key()
        self._client = openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=settings.base_url or OPENAI_URL,
            timeout=settings.timeout_s,
            max_retries=0,  # ask() retries, so that its bounds are known and its failures counted once
        )

    @property
    def place(self) -> str:
        """The endpoint and the model, as errors name them."""
        return f"judge {self.settings.model!r} at {self.settings.base_url or OPENAI_URL}"

    def ask(self, match: Match, pause: Pause) -> str:
        """The judgment, after as many attempts as it takes and ``judge.retries`` allows.

        Raises:
            JudgeError: the endpoint refuses the request, or every attempt failed.
            StoppedError: ``pause`` says that the work was given up.
        """
        name = f"question {match.question_id}, turn {match.turn}"
        for attempt in range(self.settings.retries + 1):
            try:
                return self._attempt(match)
            except PassingError as error:
                failure = error
            if attempt < self.settings.retries and pause(wait_s(attempt, failure.retry_after_s, name)):
                raise StoppedError
        raise JudgeError(
            f"{self.place}: no judgment of {name} in {self.settings.retries + 1} attempts (the last: {failure}); see "
            "that the endpoint answers, or raise judge.retries or judge.timeout_s"
        )

    def _attempt(self, match: Match) -> str:
        try:
            reply: Any = self._client.chat.completions.create(
                model=self.settings.model,
                messages=match.conversation,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=self.settings.max_new_tokens,
            )
        except self._errors.APITimeoutError:
            raise PassingError(f"no answer within {self.settings.timeout_s:g} s") from None
        except self._errors.APIConnectionError as error:
            raise PassingError(f"the connection failed: {self._short(error.__cause__ or error)}") from None
        except self._errors.APIStatusError as error:
            raise self._refused(error) from None
        except (self._errors.OpenAIError, ValueError) as error:  # a body that is no JSON, or no chat completion
            raise PassingError(f"the answer is no chat completion ({type(error).__name__})") from None
        return _content(reply)

    def _refused(self, error: APIStatusError) -> PassingError | JudgeError:
        """What an HTTP error means: 408, 409, 429 and 5xx may pass, unless the account's quota is used up."""
        status, said = error.status_code, self._short(_message(error.body))
        said = f"{status}: {said}" if said else str(status)
        if (status in (408, 409, 429) or status >= 500) and error.code != "insufficient_quota":
            return PassingError(f"HTTP {said}", retry_after_s(error.response.headers))
        if status in (401, 403):
            fix = f"set {KEY_VARIABLE} to a key that this endpoint takes"
            return JudgeError(f"{self.place}: refuses the key with HTTP {status}; {fix}")
        if status == 404:
            return JudgeError(f"{self.place}: HTTP {said}; set judge.base_url (it usually ends in /v1) and judge.model")
        fix = "the account has no quota left" if status == 429 else "the same request would fail again"
        return JudgeError(f"{self.place}: refuses the request with HTTP {said}; {fix}: change judge.* or the endpoint")

    def _short(self, text: object) -> str:
        """One short line without the key."""
        shown = str(text).replace(self._key, "***") if self._key else str(text)
        return " ".join(shown.split())[:200]


def _key() -> str:
    """The key, without the line end that a file may have given it; empty for none."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def wait_s(attempt: int, asked_s: float | None, name: str) -> float:
    """Seconds to wait after failed attempt ``attempt`` (from 0): half to all of 1, 2, 4 … 60, or as long as asked.

    The jitter is keyed by the request's ``name``, so that requests that failed together do not come back together.
    """
    full = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 30))
    jittered = full * (0.5 + keys.derive(0, "judge back-off", name, attempt) / 2**64)
    return max(jittered, min(asked_s or 0.0, LONGEST_RETRY_AFTER_S))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait, given as seconds or as a date; None without a sound one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _content(reply: Any) -> str:
    """The text of a chat completion.

    Raises:
        PassingError: it has no choice or no text.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise PassingError("the answer has no choices")
    content = getattr(getattr(choices[0], "message", None), "content", None)
    if not isinstance(content, str) or not content.strip():
        raise PassingError(f"the answer has no text (finish_reason {getattr(choices[0], 'finish_reason', None)})")
    return content.encode("utf-8", "replace").decode()  # half a surrogate pair can come as JSON, but not go to a file


def _message(body: object) -> str:
    """What an error's body says; empty if it is not of OpenAI's form."""
    said = body.get("message") if isinstance(body, dict) else None
    return said if isinstance(said, str) else ""
