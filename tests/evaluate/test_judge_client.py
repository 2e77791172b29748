"""One request: what is sent, what is tried again, how long is waited, and what is an error at once."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import Any

import pytest

from fedsim.base.errors import ConfigError, JudgeError
from fedsim.config import JudgeConfig
from fedsim.evaluate.judge_client import OpenAiClient, check_client
from fedsim.evaluate.judge_pool import request_loop
from fedsim.evaluate.judge_prompts import Match
from fedsim.evaluate.judge_replies import TurnError, retry_after_s

MATCH = Match(81, 2, "single-v1-multi-turn", "Be fair.", "Rate the kite and its length.")
SECRET = "sk-kite-0123456789"


def ask(client: OpenAiClient, match: Match = MATCH) -> str:
    """The client's judgment, from the event loop of all requests."""
    return asyncio.run_coroutine_threadsafe(client.ask(match), request_loop()).result(30.0)


def settings(endpoint: Any, **changed: Any) -> JudgeConfig:
    """A judge at the local endpoint."""
    return JudgeConfig(
        **{"kind": "openai", "model": "kite-judge", "base_url": endpoint.url, "timeout_s": 5.0, **changed}
    )


def test_what_is_sent(endpoint: Any, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/elsewhere")  # the configuration alone says where
    assert ask(OpenAiClient(settings(endpoint, max_new_tokens=77))) == "Rating: [[5]]"
    assert endpoint.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "kite-judge",
            "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": MATCH.user}],
            "temperature": 0,
            "max_tokens": 77,
        }
    ]
    assert endpoint.keys == ["Bearer EMPTY"] and pauses == []
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    ask(OpenAiClient(settings(endpoint)))
    assert endpoint.keys[1] == f"Bearer {SECRET}"


def body(answer: Any) -> bytes:
    """JSON."""
    return json.dumps(answer).encode()


AWAY = {"dropped in the body", "408", "409", "429", "503", "503 not to be retried"}
"""Failures that say nothing of the turn: they end the work if they last."""

JUNK: dict[str, tuple[dict[str, Any], str]] = {
    "dropped in the body": ({"body": b'{"choices": [', "cut": 5}, "the connection failed"),
    "no JSON": ({"body": b"{not json"}, "no chat completion"),
    "not UTF-8": ({"body": b'{"choices": "\xff\xfe"}'}, "no chat completion"),
    "a page": ({"body": b"<html>", "headers": {"content-type": "text/html"}}, "no chat completion"),
    "null": ({"body": b"null"}, "no choices"),
    "a list": ({"body": b"[1]"}, "no choices"),
    "nothing": ({"body": b"{}"}, "no choices"),
    "choices are empty": ({"body": body({"choices": []})}, "no choices"),
    "a choice is no object": ({"body": body({"choices": ["x"]})}, "no text"),
    "no message": ({"body": body({"choices": [{"message": None}]})}, "no text"),
    "no content": (
        {"body": body({"choices": [{"finish_reason": "tool_calls", "message": {"content": None}}]})},
        r"no text \(finish_reason tool_calls\)",
    ),
    "filtered": (
        {"body": body({"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]})},
        r"no text \(finish_reason content_filter\)",
    ),
    "a reason from the prompt": (
        {"body": body({"choices": [{"finish_reason": "kite", "message": {"content": ""}}]})},
        r"no text\)",
    ),
    "no text parts": ({"body": body({"choices": [{"message": {"content": [{"type": "image"}, 3]}}]})}, "no text"),
    "nested deeply": ({"body": b"[" * 100_000}, r"no chat completion \(RecursionError\)"),
    "a number without end": ({"body": b'{"choices": ' + b"9" * 5000 + b"}"}, "no chat completion"),
    "blank": ({"body": body({"choices": [{"message": {"content": " \n"}}]})}, "no text"),
    "408": ({"body": body({}), "status": 408}, "HTTP 408"),
    "409": ({"body": body({}), "status": 409}, "HTTP 409"),
    "429": ({"body": body({"error": {"message": "slow down"}}), "status": 429}, "HTTP 429"),
    "500": ({"body": b"<html>oops", "status": 500}, "HTTP 500"),
    "503": ({"body": body({"error": "text"}), "status": 503}, "HTTP 503"),
    "503 not to be retried": (
        {"body": body({}), "status": 503, "headers": {"x-should-retry": "false", "retry-after-ms": "1e9"}},
        "HTTP 503",
    ),
}


@pytest.mark.parametrize("name", JUNK)
def test_a_failure_that_may_pass_is_tried_again(endpoint: Any, pauses: list[float], name: str) -> None:
    junk, words = JUNK[name]
    endpoint.answer = lambda number, request: endpoint.Answer(**junk) if number < 2 else "Rating: [[8]]"
    assert ask(OpenAiClient(settings(endpoint, retries=2))) == "Rating: [[8]]"
    assert len(endpoint.requests) == 3 and len(pauses) == 2
    endpoint.answer = lambda number, request: endpoint.Answer(**junk)
    with pytest.raises(
        JudgeError if name in AWAY else TurnError,
        match=rf"'kite-judge' at {endpoint.url}: no judgment of question 81, turn 2 in 2 attempts \(the last: .*{words}"
        r".*judge\.retries",
    ):
        ask(OpenAiClient(settings(endpoint, retries=1)))
    assert len(endpoint.requests) == 5 and len(pauses) == 3  # no pause after the last attempt


def test_silence_and_a_closed_port_are_failures_too(endpoint: Any) -> None:
    endpoint.answer = lambda number, request: time.sleep(1.0) or "late"
    with pytest.raises(TurnError, match=r"in 1 attempts \(the last: no answer within 0\.2 s\).*judge\.timeout_s"):
        ask(OpenAiClient(settings(endpoint, retries=0, timeout_s=0.2)))
    with pytest.raises(JudgeError, match=r"the connection failed: Connect call failed"):
        ask(OpenAiClient(settings(endpoint, retries=0, base_url="http://127.0.0.1:9/v1")))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (402, None, "HTTP 402"),
        (401, None, "refuses the key with HTTP 401; set OPENAI_API_KEY"),
        (403, None, "refuses the key with HTTP 403; set OPENAI_API_KEY"),
        (404, "model_not_found", r"HTTP 404 \(model_not_found\); set judge.base_url .* and judge.model"),
        (429, "insufficient_quota", r"HTTP 429 \(insufficient_quota\); the account has no quota left"),
    ],
)
def test_a_refusal_is_an_error_at_once(
    endpoint: Any, pauses: list[float], status: int, code: str | None, words: str
) -> None:
    said = body({"error": {"message": "the reason", "code": code}})
    ordered = {"x-should-retry": "true", "retry-after": "1"}  # by an endpoint that does not know better
    endpoint.answer = lambda number, request: endpoint.Answer(said, status, ordered)
    with pytest.raises(JudgeError, match=f"judge 'kite-judge' at {endpoint.url}: .*{words}"):
        ask(OpenAiClient(settings(endpoint)))
    assert len(endpoint.requests) == 1 and pauses == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_of_one_turn_is_told_apart(endpoint: Any, status: int) -> None:
    error = {"message": "no", "code": "content_filter", "type": "BadRequestError", "param": "messages"}
    endpoint.answer = lambda number, request: endpoint.Answer(body({"error": error}), status)
    with pytest.raises(TurnError, match=rf"refuses question 81, turn 2 with HTTP {status} "
                       r"\(content_filter, BadRequestError, messages\); "):  # fmt: skip
        ask(OpenAiClient(settings(endpoint)))
    assert len(endpoint.requests) == 1


def test_a_prompt_that_is_too_long_is_called_so(endpoint: Any) -> None:
    said = body({"error": {"message": "This model's maximum context length is 9 tokens", "code": 400}})
    endpoint.answer = lambda number, request: endpoint.Answer(said, 400)
    with pytest.raises(TurnError, match=r"HTTP 400 \(the request does not fit into the judge's context"):
        ask(OpenAiClient(settings(endpoint)))


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_no_word_of_the_prompt_is_shown(endpoint: Any, status: int) -> None:
    """An endpoint that echoes the prompt wherever it can: in message, code, type and parameter."""

    def answer(number: int, request: dict[str, Any]) -> Any:
        user = request["messages"][1]["content"]
        error = {"message": f"cannot take {user!r}", "code": user, "type": user.split()[1][:-1], "param": "Rate"}
        return endpoint.Answer(body({"error": error}), status)

    endpoint.answer = answer
    match = Match(81, 2, "single-v1-multi-turn", "Be fair.", "Rate umbrella, as_long_a_word_as_this_one.")
    with pytest.raises((JudgeError, TurnError)) as error:
        ask(OpenAiClient(settings(endpoint, retries=0)), match)
    assert f"HTTP {status}" in str(error.value)
    assert not any(word in str(error.value) for word in ("umbrella", "Rate", "as_long", "cannot take"))


@contextmanager
def dripping(start: bytes) -> Iterator[str]:
    """An endpoint that sends ``start``, and then a byte now and then; its address."""
    over = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
                connection.recv(65536)
                connection.sendall(start)
                while not over.wait(0.05):
                    connection.sendall(b"x")
                return
            except OSError:  # the client has gone
                if over.is_set():
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        over.set()
        server.close()


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\ncontent-length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: ",
    ],
    ids=["body", "body of an error", "headers"],
)
def test_an_endpoint_that_drips_is_left_at_the_deadline(endpoint: Any, pauses: list[float], start: bytes) -> None:
    with dripping(start) as url:
        begun = time.monotonic()
        with pytest.raises(TurnError, match=r"no answer within 0\.4 s"):
            ask(OpenAiClient(settings(endpoint, base_url=url, retries=1, timeout_s=0.4)))
        assert 0.8 <= time.monotonic() - begun < 5.0


def picky(endpoint: Any, refused: dict[str, dict[str, Any]]) -> Any:
    """Answers unless a parameter of ``refused`` is given."""

    def answer(number: int, request: dict[str, Any]) -> Any:
        found = [error for name, error in refused.items() if name in request]
        return endpoint.Answer(body({"error": found[0]}), 400) if found else "Rating: [[6]]"

    return answer


OTHER_LIMIT = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
}
NO_TEMPERATURE = {"message": "temperature does not support 0; only the default (1) is supported."}


@pytest.mark.parametrize(
    "error", [OTHER_LIMIT, {"message": "", "param": "max_tokens", "code": "unsupported_parameter"}]
)
def test_an_endpoint_may_want_max_completion_tokens(endpoint: Any, error: dict[str, Any]) -> None:
    endpoint.answer = picky(endpoint, {"max_tokens": error})
    client = OpenAiClient(settings(endpoint, max_new_tokens=77, retries=0))
    assert ask(client) == ask(client) == "Rating: [[6]]"
    forms = [(r.get("max_tokens"), r.get("max_completion_tokens"), r["temperature"]) for r in endpoint.requests]
    assert forms == [(77, None, 0), (None, 77, 0), (None, 77, 0)]  # found out once
    assert client.news() == ()


@pytest.mark.parametrize("error", [NO_TEMPERATURE, {"message": "", "param": "temperature"}])
def test_an_endpoint_may_refuse_the_temperature_and_it_is_said_once(endpoint: Any, error: dict[str, Any]) -> None:
    endpoint.answer = picky(endpoint, {"temperature": error, "max_tokens": OTHER_LIMIT})
    client = OpenAiClient(settings(endpoint, retries=0))
    assert ask(client) == ask(client) == "Rating: [[6]]"
    assert [("temperature" in r, "max_tokens" in r) for r in endpoint.requests][-2:] == [(False, False)] * 2
    assert len(endpoint.requests) == 4
    (line,) = client.news()
    assert "refuses temperature=0" in line and client.news() == ()


def test_a_limit_that_is_too_high_is_no_wish_for_another_name(endpoint: Any) -> None:
    error = {"message": "max_tokens is too large", "param": "max_tokens", "code": "invalid_value"}
    endpoint.answer = picky(endpoint, {"max_tokens": error})
    with pytest.raises(TurnError, match=r"HTTP 400 \(invalid_value, max_tokens\)"):
        ask(OpenAiClient(settings(endpoint)))
    assert len(endpoint.requests) == 1


def test_an_echo_of_the_prompt_changes_no_parameter(endpoint: Any) -> None:
    words = "The temperature is unsupported, says max_completion_tokens."
    endpoint.answer = picky(endpoint, {"messages": {"message": words}})
    with pytest.raises(TurnError):
        ask(OpenAiClient(settings(endpoint)), Match(81, 1, "single-v1", "", words))
    assert len(endpoint.requests) == 1


def test_content_may_come_in_parts(endpoint: Any) -> None:
    parts = [{"type": "text", "text": "Rating: "}, {"type": "image"}, {"type": "text", "text": "[[7]]"}]
    endpoint.answer = lambda number, request: endpoint.Answer(body({"choices": [{"message": {"content": parts}}]}))
    assert ask(OpenAiClient(settings(endpoint))) == "Rating: [[7]]"


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_the_key_is_never_shown(
    endpoint: Any, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = body({"error": {"message": f"key {SECRET} is\n  bad " + "x" * 1000, "code": SECRET, "type": f"a{SECRET}"}})
    endpoint.answer = lambda number, request: endpoint.Answer(said, status)
    with caplog.at_level(logging.INFO), pytest.raises((JudgeError, TurnError)) as error:
        ask(OpenAiClient(settings(endpoint, retries=0)))
    assert SECRET not in str(error.value) and SECRET not in caplog.text
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_pauses_grow_and_have_bounds(endpoint: Any, pauses: list[float]) -> None:
    """openai's own: half a second to 8 s, a little less each by chance."""
    endpoint.answer = lambda number, request: 503
    with pytest.raises(JudgeError, match="in 8 attempts"):
        ask(OpenAiClient(settings(endpoint, retries=7)))
    assert len(endpoint.requests) == 8
    assert pauses == sorted(pauses[:4]) + pauses[4:] and all(0 < pause <= 60 for pause in pauses)
    assert pauses[0] < 2 < 5 < pauses[-1]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.parametrize(("asked", "waited"), [(17, 17), (119, 119), (200, 120), (10**6, 120)])
def test_retry_after_is_honoured(
    endpoint: Any, pauses: list[float], status: int, as_date: bool, asked: int, waited: int
) -> None:
    """However long it asks to wait, the endpoint is asked again, and never later than after two minutes."""
    value = email.utils.formatdate(time.time() + asked, usegmt=True) if as_date else str(asked)
    busy = endpoint.Answer(b"{}", status, {"retry-after": value})
    endpoint.answer = lambda number, request: busy if number < 2 else "Rating: [[8]]"
    assert ask(OpenAiClient(settings(endpoint))) == "Rating: [[8]]"
    assert pauses == pytest.approx([waited] * 2, abs=2.0 if as_date else 0.0)


def test_retry_after_is_waited_for(endpoint: Any) -> None:
    asked_at: list[float] = []

    def answer(number: int, request: dict[str, Any]) -> Any:
        asked_at.append(time.monotonic())
        return "Rating: [[8]]" if number else endpoint.Answer(b"{}", 429, {"retry-after": "1.5"})

    endpoint.answer = answer
    ask(OpenAiClient(settings(endpoint)))
    assert 1.5 <= asked_at[1] - asked_at[0] < 5.0


def cancelled(endpoint: Any, client: OpenAiClient, reached: threading.Event) -> str | None:
    """What becomes of a request that is cancelled once ``reached`` is set: its judgment, or None for none."""

    async def work() -> str | None:
        task = asyncio.create_task(client.ask(MATCH))
        await asyncio.to_thread(reached.wait, 10.0)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    return asyncio.run_coroutine_threadsafe(work(), request_loop()).result(30.0)


def test_a_request_that_waits_ends_when_it_is_cancelled(endpoint: Any) -> None:
    reached = threading.Event()

    def answer(number: int, request: dict[str, Any]) -> Any:
        reached.set()
        return endpoint.Answer(b"{}", 429, {"retry-after": "60"})

    endpoint.answer = answer
    begun = time.monotonic()
    assert cancelled(endpoint, OpenAiClient(settings(endpoint)), reached) is None
    assert time.monotonic() - begun < 5.0 and len(endpoint.requests) == 1


@pytest.mark.parametrize(("last", "judgment"), [("Rating: [[8]]", "Rating: [[8]]"), (" ", None), (503, None)])
def test_an_answer_under_way_is_kept_when_it_is_cancelled(endpoint: Any, last: str | int, judgment: str | None) -> None:
    """The request was paid for. If it fails, it is not sent again."""
    reached = threading.Event()

    def answer(number: int, request: dict[str, Any]) -> Any:
        reached.set()
        time.sleep(0.4)
        return last

    endpoint.answer = answer
    assert cancelled(endpoint, OpenAiClient(settings(endpoint)), reached) == judgment
    assert len(endpoint.requests) == 1


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after_s({}) is None
    assert retry_after_s({"retry-after": "2.5"}) == 2.5 and retry_after_s({"retry-after": "-3"}) == 0.0
    for junk in ("soon", "", "nan", "inf", "1e999"):
        assert retry_after_s({"retry-after": junk}) is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    wait = retry_after_s({"retry-after": date})
    assert wait is not None and 25 < wait < 31
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


def test_half_a_surrogate_pair_can_be_written_to_a_file(endpoint: Any) -> None:
    endpoint.answer = lambda number, request: endpoint.Answer(
        rb'{"choices": [{"message": {"content": "a\ud800 [[3]]"}}]}'
    )
    assert ask(OpenAiClient(settings(endpoint))).encode() == b"a? [[3]]"


def test_what_is_missing_is_found_without_a_request(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_client(settings(endpoint))
    check_client(settings(endpoint, base_url="https://[::1]:8000/v1"))
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


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://localhost/v1", "http://[::1", "http://localhost:80a/v1", "http://localhost:99999/v1",
     "http://", "http:///v1", "http://:80/v1"],
)  # fmt: skip
def test_an_address_that_is_none(endpoint: Any, url: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url='.*': must be an address with host"):
        check_client(settings(endpoint, base_url=url))


def test_a_password_in_the_address_is_refused_and_not_repeated(endpoint: Any) -> None:
    for kind in ("openai", "none"):  # either would write it to config.yaml
        with pytest.raises(ConfigError, match=r"judge\.base_url: must not hold '@'") as error:
            settings(endpoint, kind=kind, base_url="http://kite:s3cret@localhost:8000/v1")
        assert "s3cret" not in str(error.value) and "kite:" not in str(error.value)


@pytest.mark.parametrize("proxy", ["foo://kite:s3cret@localhost:1", "http://[::1"])
def test_a_proxy_that_cannot_be_used(endpoint: Any, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigError, match=r"ALL_PROXY.* correct or unset it") as error:
        check_client(settings(endpoint))
    assert "s3cret" not in str(error.value)


def test_a_socks_proxy_without_its_package(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://localhost:1")
    with pytest.raises(ConfigError, match=r"\(ImportError\).* pip install socksio"):
        check_client(settings(endpoint))
