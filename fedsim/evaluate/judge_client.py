"""Requests to an OpenAI-compatible endpoint, with openai's own retries, and their errors.

The key is taken only from ``OPENAI_API_KEY`` and never shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fedsim.base.errors import ConfigError, JudgeError
from fedsim.config import JudgeConfig
from fedsim.evaluate import judge_replies
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import TurnError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

OPENAI_URL: Final = "https://api.openai.com/v1"
KEY_VARIABLE: Final = "OPENAI_API_KEY"
NO_KEY: Final = "EMPTY"
"""Sent as the key to an endpoint of the user's own without keys, as is usual with vLLM."""

OF_THE_TURN: Final = (400, 413, 422)
"""Refusals that may be about one turn's text, such as a content filter's."""


def check_client(settings: JudgeConfig) -> AsyncOpenAI:
    """Check without a request that the endpoint could be asked, and return the client for it.

    Raises:
        ConfigError: the ``openai`` package or the key is missing, ``judge.base_url`` is no address,
            or the environment names a proxy that cannot be used.
    """
    if find_spec("openai") is None or find_spec("httpx2") is None:  # older ones are over httpx
        fix = "pip install 'fedsim[judge]'"
        raise ConfigError(f"judge.kind=openai needs the openai package, 3.0 or newer: {fix}")
    if settings.base_url:
        _check_address(settings.base_url)
    key = _key()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE}: holds a character that no key has; export it again")
    if not settings.base_url and not key:
        other = "set judge.base_url to an endpoint of your own"
        raise ConfigError(f"judge.kind=openai needs a key: export {KEY_VARIABLE}, or {other}")
    import openai

    from fedsim.evaluate.judge_http import AttemptClient

    try:
        return openai.AsyncOpenAI(
            api_key=key or NO_KEY,
            base_url=settings.base_url or OPENAI_URL,
            timeout=None,  # AttemptClient has the deadline
            max_retries=settings.retries,
            http_client=AttemptClient(settings.timeout_s),
        )
    except Exception as error:
        # The address was checked above, so that it is the proxy; the error may hold its password.
        raise ConfigError(
            "judge.kind=openai: no client can be made with the proxy of ALL_PROXY, HTTPS_PROXY "
            f"or HTTP_PROXY ({type(error).__name__}); correct or unset it (a socks5:// one needs: "
            "pip install socksio)",
        ) from None


class OpenAiClient:
    """Client of one endpoint and model.

    All its requests run on one event loop, several at a time.

    Args:
        settings: see :class:`fedsim.config.JudgeConfig`.

    Raises:
        ConfigError: see :func:`check_client`.
    """

    def __init__(self, settings: JudgeConfig) -> None:
        self._client = check_client(settings)
        self.settings = settings
        self._key = _key()
        self._form: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
        self._news: list[str] = []

    @property
    def place(self) -> str:
        """The endpoint and the model, as errors name them."""
        return f"judge {self.settings.model!r} at {self.settings.base_url or OPENAI_URL}"

    def news(self) -> tuple[str, ...]:
        """Return the remarks for the user on how the endpoint is asked, and forget them."""
        news, self._news = tuple(self._news), []
        return news

    async def ask(self, match: Match) -> str:
        """Ask for a judgment, in as many attempts as ``judge.retries`` allows.

        Raises:
            TurnError: the endpoint refuses this turn, or gives no usable answer to it in any
                attempt.
            JudgeError: the endpoint refuses every request, or cannot be reached in any attempt.
        """
        import openai

        from fedsim.evaluate.judge_http import AttemptError

        hidden = f"{match.system} {match.user} {self._key}"  # never shown in an error
        messages: Any = match.conversation
        # Each pass has another form of request, of which a request tries at most three.
        while True:
            form = self._form
            try:
                reply = await self._client.chat.completions.with_raw_response.create(
                    model=self.settings.model,
                    messages=messages,
                    **form,
                )
                return judge_replies.content(reply.content)
            except openai.APIConnectionError as error:
                if isinstance(error.__cause__, AttemptError):
                    raise TurnError(self._exhausted(match, str(error.__cause__))) from None
                reason = f"the connection failed: {judge_replies.cause(error)}"
                raise JudgeError(self._exhausted(match, reason)) from None
            except openai.APIStatusError as error:
                if not self._adapts(error, hidden, form):
                    said = judge_replies.status_text(error, hidden)
                    raise self._refused(error, said, match) from None
            except Exception as error:  # any error of reading the body of an error
                reason = f"the answer cannot be read ({type(error).__name__})"
                raise TurnError(self._exhausted(match, reason)) from None

    def _exhausted(self, match: Match, last: str) -> str:
        """Text of the error that no attempt gave a judgment."""
        return (
            f"{self.place}: no judgment of question {match.question_id}, turn {match.turn} in "
            f"{self.settings.retries + 1} attempts (the last: {last}); see that the endpoint "
            "answers, or raise judge.retries or judge.timeout_s"
        )

    def _adapts(self, error: APIStatusError, hidden: str, form: Mapping[str, Any]) -> bool:
        """Change the form of requests where the endpoint refuses ``form``.

        Returns:
            True if there is another form, which all requests have from now on.
        """
        if error.status_code not in OF_THE_TURN:
            return False
        changed = dict(form)
        if "max_tokens" in form and judge_replies.wants_other_limit(error, hidden):
            changed["max_completion_tokens"] = changed.pop("max_tokens")
        elif "temperature" in form and judge_replies.refuses_temperature(error, hidden):
            del changed["temperature"]
        else:
            return False
        if self._form == form:  # else another request has changed it meanwhile
            self._form = changed
            if "temperature" in form and "temperature" not in changed:
                self._news.append(
                    f"{self.place} refuses temperature=0 and is asked without it: its judgments "
                    "are drawn, and differ from one time to the next",
                )
        return True

    def _refused(self, error: APIStatusError, said: str, match: Match) -> TurnError | JudgeError:
        """Make the error for an HTTP error that lasted or cannot pass.

        Args:
            error: the last attempt's.
            said: its status and names (:func:`fedsim.evaluate.judge_replies.status_text`).
            match: the turn that was asked for.
        """
        status = error.status_code
        # Errors that lasted over all attempts; one prompt may cause the server's own error 500.
        if judge_replies.may_pass(status, error.response.content):
            text = self._exhausted(match, said)
            if status == 500:
                return TurnError(text)
            return JudgeError(text)
        # Errors that cannot pass: of the turn, of the key, of the address, of any request.
        if status in OF_THE_TURN:
            name = f"question {match.question_id}, turn {match.turn}"
            return TurnError(
                f"{self.place}: refuses {name} with {said}; the endpoint's own log may say why",
            )
        if status in (401, 403):
            fix = f"set {KEY_VARIABLE} to a key that this endpoint takes"
            return JudgeError(f"{self.place}: refuses the key with {said}; {fix}")
        if status == 404:
            fix = "set judge.base_url (it usually ends in /v1) and judge.model"
            return JudgeError(f"{self.place}: {said}; {fix}")
        reason = "the same request would fail again"
        if status == 429:
            reason = "the account has no quota left"
        fix = "change judge.* or the endpoint"
        return JudgeError(f"{self.place}: refuses the request with {said}; {reason}: {fix}")


def _check_address(url: str) -> None:
    """Check that a URL is http or https and has a host; ConfigError if not."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of an IPv6 address
        sound = False
    if not sound:
        raise ConfigError(
            f"judge.base_url={url!r}: must be an address with host and, if need be, port, such as "
            "http://localhost:8000/v1",
        )


def _key() -> str:
    """Read the key, without the line end that a file may have given it; empty for none."""
    return os.environ.get(KEY_VARIABLE, "").strip()
