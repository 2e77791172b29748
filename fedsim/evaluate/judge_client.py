"""Asks an OpenAI-compatible endpoint for judgments, and waits and asks again where a failure may pass.

The key is taken from ``OPENAI_API_KEY`` alone and never shown. Back-off grows from 1 s to 60 s, with jitter; a
``Retry-After`` is honoured up to 5 minutes. Requests run on one event loop, which can end an attempt at its deadline
whatever the endpoint is doing, such as sending a byte now and then.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError, JudgeError
from fedsim.config import JudgeConfig
from fedsim.evaluate import judge_replies
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import PassingError, StoppedError, TurnError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

OPENAI_URL: Final = "https://api.openai.com/v1"
KEY_VARIABLE: Final = "OPENAI_API_KEY"
NO_KEY: Final = "EMPTY"
"""Sent to an endpoint of one's own that asks for no key, as users of vLLM do."""

FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 60.0
LONGEST_RETRY_AFTER_S: Final = 300.0

OF_THE_TURN: Final = (400, 413, 422)
"""Refusals that may be about one turn's text, such as a content filter's."""

Pause = Callable[[float], bool]
"""Waits so many seconds; True if the work was given up meanwhile."""


def check_client(settings: JudgeConfig) -> AsyncOpenAI:
    """Find out without a request whether the endpoint could be asked; returns the client that would ask it.

    Raises:
        ConfigError: the ``openai`` package or the key is missing, ``judge.base_url`` is no address, or the environment
            names a proxy that cannot be used.
    """
    if find_spec("openai") is None:
        raise ConfigError("judge.kind=openai needs the openai package: pip install 'fedsim[judge]'")
    if settings.base_url:
        _check_address(settings.base_url)
    key = _key()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE}: holds a character that no key has; export it anew")
    if not settings.base_url and not key:
        raise ConfigError(
            f"judge.kind=openai needs a key: export {KEY_VARIABLE}, or set judge.base_url to an endpoint of your own"
        )
    import openai

    try:
        return openai.AsyncOpenAI(
            api_key=key or NO_KEY,
            base_url=settings.base_url or OPENAI_URL,
            timeout=None,  # OpenAiClient has a deadline of its own: this one begins anew with every byte
            max_retries=0,  # OpenAiClient.ask() retries, so that its bounds are known and its failures counted once
        )
    except Exception as error:  # the address is sound: it is the proxy, and its text may hold a password
        raise ConfigError(
            f"judge.kind=openai: no client can be made with the proxy of ALL_PROXY, HTTPS_PROXY or HTTP_PROXY "
            f"({type(error).__name__}); correct or unset it (a socks5:// one needs: pip install socksio)"
        ) from None


class OpenAiClient:
    """One endpoint and model; may be used by several threads at once.

    Args:
        settings: see :class:`fedsim.config.JudgeConfig`.

    Raises:
        ConfigError: see :func:`check_client`.
    """

    def __init__(self, settings: JudgeConfig) -> None:
        self._client = check_client(settings)
        import openai

        self.settings = settings
        self._key = _key()
        self._errors = openai
        self._loop = _loop()  # here and not in the threads that ask: they would race to make one each
        self._form: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
        self._changing = threading.Lock()
        self._news: list[str] = []

    @property
    def place(self) -> str:
        """The endpoint and the model, as errors name them."""
        return f"judge {self.settings.model!r} at {self.settings.base_url or OPENAI_URL}"

    def news(self) -> tuple[str, ...]:
        """What a user should know about how the endpoint is asked; each is told once."""
        with self._changing:
            told, self._news = tuple(self._news), []
        return told

    def ask(self, match: Match, pause: Pause) -> str:
        """The judgment, after as many attempts as it takes and ``judge.retries`` allows.

        Raises:
            TurnError: the endpoint refuses this turn, or gives no usable answer to it in any attempt.
            JudgeError: the endpoint refuses every request, or cannot be reached in any attempt.
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
        text = f"no judgment of {name} in {self.settings.retries + 1} attempts (the last: {failure}); {failure.fix}"
        raise JudgeError(f"{self.place}: {text}") if failure.is_away else TurnError(f"{self.place}: {text}")

    def _attempt(self, match: Match) -> str:
        form, hidden = self._form, f"{match.system} {match.user} {self._key}"
        try:
            return judge_replies.content(self._reply(match, form), hidden)
        except PassingError:
            raise
        except TimeoutError:
            raise PassingError(f"no answer within {self.settings.timeout_s:g} s") from None
        except self._errors.APIConnectionError as error:
            raise PassingError(f"the connection failed: {judge_replies.cause(error)}", is_away=True) from None
        except self._errors.APIStatusError as error:
            if not self._adapts(error, hidden, form):
                raise self._refused(error, judge_replies.told(error, hidden), match) from None
        except Exception as error:  # whatever parsing a body can end with, such as RecursionError
            raise PassingError(f"the answer is no chat completion ({type(error).__name__})") from None
        return self._attempt(match)  # in another form; there are only so many

    def _reply(self, match: Match, form: Mapping[str, Any]) -> Any:
        """The endpoint's answer.

        Raises:
            TimeoutError: it is not whole within ``judge.timeout_s``.
        """
        messages: Any = match.conversation
        request = self._client.chat.completions.create(model=self.settings.model, messages=messages, **form)
        limited = asyncio.wait_for(request, self.settings.timeout_s)
        return asyncio.run_coroutine_threadsafe(limited, self._loop).result()

    def _adapts(self, error: APIStatusError, hidden: str, form: Mapping[str, Any]) -> bool:
        """Return whether the endpoint wants another form of request than ``form``, which is used from now on."""
        if error.status_code not in OF_THE_TURN:
            return False
        changed = dict(form)
        if "max_tokens" in form and judge_replies.wants_other_limit(error, hidden):
            changed["max_completion_tokens"] = changed.pop("max_tokens")
        elif "temperature" in form and judge_replies.refuses_temperature(error, hidden):
            del changed["temperature"]
        else:
            return False
        with self._changing:
            if self._form == form:  # no other thread was faster
                self._form = changed
                if "temperature" in form and "temperature" not in changed:
                    self._news.append(
                        f"{self.place} refuses temperature=0 and is asked without it: its judgments are drawn, and "
                        "differ from one time to the next"
                    )
        return True

    def _refused(self, error: APIStatusError, said: str, match: Match) -> PassingError | TurnError | JudgeError:
        """What an HTTP error means: 408, 409, 429 and 5xx may pass, unless the account's quota is used up."""
        status = error.status_code
        if (status in (408, 409, 429) or status >= 500) and error.code != "insufficient_quota":
            wait = retry_after_s(error.response.headers)
            return PassingError(said, wait, is_away=status != 500)  # 500 may be what one prompt does to it
        if status in OF_THE_TURN:
            name = f"question {match.question_id}, turn {match.turn}"
            return TurnError(f"{self.place}: refuses {name} with {said}; the endpoint's own log may say why")
        if status in (401, 403):
            fix = f"set {KEY_VARIABLE} to a key that this endpoint takes"
            return JudgeError(f"{self.place}: refuses the key with {said}; {fix}")
        if status == 404:
            return JudgeError(f"{self.place}: {said}; set judge.base_url (it usually ends in /v1) and judge.model")
        fix = "the account has no quota left" if status == 429 else "the same request would fail again"
        return JudgeError(f"{self.place}: refuses the request with {said}; {fix}: change judge.* or the endpoint")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all clients; its thread dies with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge-requests", daemon=True).start()
    return loop


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of an IPv6 address
        sound = False
    if not sound:
        raise ConfigError(
            f"judge.base_url={url!r}: must be an address with host and, if need be, port, such as "
            "http://localhost:8000/v1"
        )


def _key() -> str:
    """The key, without the line end that a file may have given it; empty for none."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def wait_s(attempt: int, asked_s: float | None, name: str) -> float:
    """Seconds to wait after failed attempt ``attempt`` (from 0): half to all of 1, 2, 4 … 60, or as long as asked.

    The jitter is keyed by the request's ``name``, so that requests that failed together do not come back together.
    """
    full = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 30))
    jittered = full * (0.5 + keyed_random.derive(0, "judge back-off", name, attempt) / 2**64)
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
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
