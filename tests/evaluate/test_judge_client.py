"""One request: what is sent, what is tried again, how long is waited, and what is an error at once."""

from __future__ import annotations

import email.utils
import json
import logging
import sys
import time
from importlib.machinery import PathFinder
from typing import Any

import pytest

from fedsim.config import JudgeConfig
from fedsim.errors import ConfigError, JudgeError
from fedsim.evaluate.judge_client import OpenAiClient, StoppedError, check_client, retry_after_s, wait_s
from fedsim.evaluate.judge_prompts import Match

MATCH = Match(81, 2, "single-v1-multi-turn", "Be fair.", "Rate the kite.")
SECRET = "sk-kite-0123456789"


class Pauses:
    """Counts pauses instead of taking them."""

    def __init__(self, give_up: bool = False) -> None:
        self.seconds: list[float] = []
        self.give_up = give_up

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return self.give_up


def settings(endpoint: Any, **changed: Any) -> JudgeConfig:
    """A judge at the local endpoint."""
    return JudgeConfig(
        **{"kind": "openai", "model": "kite-judge", "base_url": endpoint.url, "timeout_s": 5.0, **changed}
    )


def test_what_is_sent(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/elsewhere")  # the configuration alone says where
    pauses = Pauses()
    assert OpenAiClient(settings(endpoint, max_new_tokens=77)).ask(MATCH, pauses) == "Rating: [[5]]"
    assert endpoint.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "kite-judge",
            "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Rate the kite."}],
            "temperature": 0,
            "max_tokens": 77,
        }
    ]
    assert endpoint.keys == ["Bearer EMPTY"] and pauses.seconds == []
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    OpenAiClient(settings(endpoint)).ask(MATCH, pauses)
    assert endpoint.keys[1] == f"Bearer {SECRET}"


def body(answer: Any) -> bytes:
    """JSON."""
    return json.dumps(answer).encode()


JUNK: dict[str, tuple[dict[str, Any], str]] = {
    "dropped in the body": ({"body": b'{"choices": [', "cut": 5}, "the connection failed"),
    "no JSON": ({"body": b"{not json"}, "no chat completion"),
    "not UTF-8": ({"body": b'{"choices": "\xff\xfe"}'}, "no chat completion"),
    "a page": ({"body": b"<html>", "headers": {"content-type": "text/html"}}, "no choices"),
    "null": ({"body": b"null"}, "no choices"),
    "a list": ({"body": b"[1]"}, "no choices"),
    "nothing": ({"body": b"{}"}, "no choices"),
    "choices are empty": ({"body": body({"choices": []})}, "no choices"),
    "a choice is no object": ({"body": body({"choices": ["x"]})}, "no text"),
    "no message": ({"body": body({"choices": [{"message": None}]})}, "no text"),
    "no content": (
        {"body": body({"choices": [{"finish_reason": "length", "message": {"content": None}}]})},
        r"no text \(finish_reason length\)",
    ),
    "blank": ({"body": body({"choices": [{"message": {"content": " \n"}}]})}, "no text"),
    "408": ({"body": body({}), "status": 408}, "HTTP 408"),
    "409": ({"body": body({}), "status": 409}, "HTTP 409"),
    "429": ({"body": body({"error": {"message": "slow down"}}), "status": 429}, "HTTP 429: slow down"),
    "500": ({"body": b"<html>oops", "status": 500}, "HTTP 500"),
    "503": ({"body": body({"error": "text"}), "status": 503}, "HTTP 503"),
}


@pytest.mark.parametrize("name", JUNK)
def test_a_failure_that_may_pass_is_tried_again(endpoint: Any, name: str) -> None:
    junk, words = JUNK[name]
    endpoint.answer = lambda number, request: endpoint.Answer(**junk) if number < 2 else "Rating: [[8]]"
    pauses = Pauses()
    assert OpenAiClient(settings(endpoint, retries=2)).ask(MATCH, pauses) == "Rating: [[8]]"
    assert len(endpoint.requests) == 3 and len(pauses.seconds) == 2
    endpoint.answer = lambda number, request: endpoint.Answer(**junk)
    with pytest.raises(JudgeError, match=rf"'kite-judge' at {endpoint.url}: no judgment of question 81, turn 2 in 2 "
                       rf"attempts \(the last: .*{words}.*judge\.retries"):  # fmt: skip
        OpenAiClient(settings(endpoint, retries=1)).ask(MATCH, pauses)
    assert len(endpoint.requests) == 5 and len(pauses.seconds) == 3  # no pause after the last attempt


def test_silence_and_a_closed_port_are_failures_too(endpoint: Any) -> None:
    endpoint.answer = lambda number, request: time.sleep(1.0) or "late"
    with pytest.raises(JudgeError, match=r"in 1 attempts \(the last: no answer within 0\.2 s\)"):
        OpenAiClient(settings(endpoint, retries=0, timeout_s=0.2)).ask(MATCH, Pauses())
    with pytest.raises(JudgeError, match="the connection failed"):
        OpenAiClient(settings(endpoint, retries=0, base_url="http://127.0.0.1:9/v1")).ask(MATCH, Pauses())


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, None, "HTTP 400: the reason"),
        (401, None, "refuses the key with HTTP 401; set OPENAI_API_KEY"),
        (403, None, "refuses the key with HTTP 403; set OPENAI_API_KEY"),
        (404, None, "HTTP 404: the reason; set judge.base_url .* and judge.model"),
        (422, None, "HTTP 422: the reason"),
        (429, "insufficient_quota", "HTTP 429: the reason; the account has no quota left"),
    ],
)
def test_a_refusal_is_an_error_at_once(endpoint: Any, status: int, code: str | None, words: str) -> None:
    said = body({"error": {"message": "the reason", "code": code}})
    endpoint.answer = lambda number, request: endpoint.Answer(said, status)
    pauses = Pauses()
    with pytest.raises(JudgeError, match=f"judge 'kite-judge' at {endpoint.url}: .*{words}"):
        OpenAiClient(settings(endpoint)).ask(MATCH, pauses)
    assert len(endpoint.requests) == 1 and pauses.seconds == []


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_the_key_is_never_shown(
    endpoint: Any, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = body({"error": {"message": f"key {SECRET} is\n  bad " + "x" * 1000}})
    endpoint.answer = lambda number, request: endpoint.Answer(said, status)
    with caplog.at_level(logging.INFO), pytest.raises(JudgeError) as error:
        OpenAiClient(settings(endpoint, retries=0)).ask(MATCH, Pauses())
    assert SECRET not in str(error.value) and SECRET not in caplog.text
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_work_that_is_given_up_ends_in_its_pause(endpoint: Any) -> None:
    endpoint.answer = lambda number, request: 500
    with pytest.raises(StoppedError):
        OpenAiClient(settings(endpoint)).ask(MATCH, Pauses(give_up=True))
    assert len(endpoint.requests) == 1


def test_pauses_grow_and_keep_their_bounds() -> None:
    for attempt, full in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        waits = [wait_s(attempt, None, f"question {n}") for n in range(50)]
        assert all(full / 2 <= wait <= full for wait in waits)
        assert max(waits) - min(waits) > full / 4  # spread, so that they do not all come back at once
    assert wait_s(0, 7.0, "q") == 7.0 and wait_s(5000, None, "q") <= 60
    assert wait_s(3, 0.5, "q") >= 4.0
    assert wait_s(0, 1e9, "q") == 300.0


def test_retry_after_is_honoured(endpoint: Any) -> None:
    answers = [endpoint.Answer(b"{}", status, {"retry-after": "17"}) for status in (429, 503)]
    endpoint.answer = lambda number, request: answers[number] if number < 2 else "Rating: [[8]]"
    pauses = Pauses()
    OpenAiClient(settings(endpoint)).ask(MATCH, pauses)
    assert pauses.seconds == [17.0, 17.0]


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after_s({}) is None
    assert retry_after_s({"retry-after": "2.5"}) == 2.5 and retry_after_s({"retry-after": "-3"}) == 0.0
    for junk in ("soon", "", "nan", "inf"):
        assert retry_after_s({"retry-after": junk}) is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    wait = retry_after_s({"retry-after": date})
    assert wait is not None and 25 < wait < 31
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


def test_half_a_surrogate_pair_can_be_written_to_a_file(endpoint: Any) -> None:
    endpoint.answer = lambda number, request: endpoint.Answer(
        rb'{"choices": [{"message": {"content": "a\ud800 [[3]]"}}]}'
    )
    assert OpenAiClient(settings(endpoint)).ask(MATCH, Pauses()).encode() == b"a? [[3]]"


def test_what_is_missing_is_found_without_a_request(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_client(settings(endpoint))
    with pytest.raises(ConfigError, match=r"judge\.base_url='localhost:8000/v1': must begin with http://"):
        check_client(settings(endpoint, base_url="localhost:8000/v1"))
    with pytest.raises(ConfigError, match=r"export OPENAI_API_KEY, or set judge\.base_url"):
        check_client(settings(endpoint, base_url=""))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    check_client(settings(endpoint, base_url=""))
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\x07x")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds a character that no key has") as error:
        OpenAiClient(settings(endpoint))
    assert SECRET not in str(error.value)
    monkeypatch.delitem(sys.modules, "openai", raising=False)
    find = PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *rest: None if name == "openai" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"pip install 'fedsim\[judge\]'"):
        check_client(settings(endpoint))
    assert endpoint.requests == []
