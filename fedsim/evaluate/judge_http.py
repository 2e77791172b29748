"""One attempt at a judge's endpoint: the HTTP client beneath openai's retries.

``openai.AsyncOpenAI(max_retries=...)`` asks again after a failed connection and a status that may
pass, with exponential back-off, jitter and ``Retry-After``. It lacks five properties, which are
implemented here:

- An attempt has a deadline. openai's timeout restarts with every byte, so that an answer of single
  bytes would never end.
- An answer without a judgment, such as one that is no JSON, is a failed attempt.
- An account without quota is not asked again, though its status is that of a rate limit.
- An endpoint that asks for a pause of more than 2 minutes is asked again after 2. openai's client
  would give up at once.
- When the work is cancelled, a pause ends, but an answer that is under way is waited for, as it
  costs money.

The module imports the optional ``openai`` and its httpx2: it is itself imported only where they are
installed.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import httpx2
import openai

from fedsim.evaluate import judge_replies

LONGEST_RETRY_AFTER_S: Final = 120.0
"""The longest pause that openai's client takes."""


class AttemptError(httpx2.RequestError):
    """A failed attempt that openai's client repeats.

    The message is without the key or any text of a prompt.
    """


class AttemptClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client of which one ``send`` is one attempt, of ``timeout_s`` seconds at most.

    Raises:
        Exception: a proxy that the environment names cannot be used.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout=None)
        self.timeout_s = timeout_s

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and return the whole answer.

        Raises:
            AttemptError: it came too late or holds no judgment.
            httpx2.RequestError: the connection failed.
        """
        # A task of its own, which a cancellation of this one does not reach.
        attempt = asyncio.create_task(self._attempt(request, options))
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            await asyncio.wait([attempt])
            if attempt.exception() is None and attempt.result().is_success:
                return attempt.result()
            raise

    async def _attempt(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        """Send once; see :meth:`send` for the errors."""
        try:
            # The deadline covers the whole answer, headers and body.
            async with asyncio.timeout(self.timeout_s):
                response = await super().send(request, **options)
            if response.is_success:
                judge_replies.content(response.content)
        except TimeoutError:
            raise AttemptError(f"no answer within {self.timeout_s:g} s") from None
        except judge_replies.UnusableError as error:
            raise AttemptError(str(error)) from None
        except httpx2.RequestError:
            raise
        except Exception as error:  # any other error of reading an answer
            raise AttemptError(f"the answer cannot be read ({type(error).__name__})") from None

        # Headers decide whether openai's client asks again, and after how many seconds.
        may_pass = judge_replies.may_pass(response.status_code, response.content)
        asked_s = judge_replies.retry_after_s(response.headers)
        response.headers["x-should-retry"] = str(may_pass).lower()
        response.headers["retry-after"] = str(min(asked_s or 0.0, LONGEST_RETRY_AFTER_S))
        response.headers.pop("retry-after-ms", None)
        return response
