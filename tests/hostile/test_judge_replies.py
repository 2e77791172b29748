"""Whatever a judge answers, in words or in bytes: a rating on the scale, none, or one failure that quotes nothing."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import JudgeError
from fedsim.config import JudgeConfig
from fedsim.evaluate import judge_replies
from fedsim.evaluate.fastchat import UNRATED
from fedsim.evaluate.judge_client import OpenAiClient
from fedsim.evaluate.judge_pool import request_loop
from fedsim.evaluate.judge_prompts import Match, parse_rating
from fedsim.evaluate.judge_replies import TurnError, UnusableError, retry_after_s
from tests.hostile.conftest import ANY_TEXT, JUNK, cases, damaged, misshapen

MATCH = Match(81, 1, "single-v1", "You are fair.", "Rate the confidential answer.")
PIECES = [
    "[[",
    "]]",
    "[",
    "]",
    "5",
    "10",
    "11",
    "0",
    ".",
    "7.5",
    "-",
    "Rating: ",
    "1e1",
    "\u0665",
    "9" * 400,
    "0" * 5000,
    "<think>",
    "</think>",
    "[THINK]",
    "<|channel|>final<|message|>",
]


@cases(150)
@given(text=st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), ANY_TEXT))
def test_a_rating_is_on_the_scale_or_there_is_none(text: str) -> None:
    value = parse_rating(text)
    assert value == UNRATED or 1 <= value <= 10
    assert json.loads(json.dumps(value)) == value, "what is written is read back"
    assert value == UNRATED or "[" in text


@pytest.mark.parametrize(
    "text", ["[[" + "9" * 3_000_000, "[" * 2_000_000, "[[1." + "0" * 3_000_000 + "]]", "[1" * 500_000]
)
def test_no_judgment_takes_long_to_read(text: str) -> None:
    began = time.monotonic()
    assert parse_rating(text) in (UNRATED, 1)
    assert time.monotonic() - began < 5


@cases(100)
@given(data=st.data())
def test_any_chat_completion(data: st.DataObject) -> None:
    """Of any shape: its text, or a failure that quotes nothing."""
    part = data.draw(st.one_of(JUNK, st.lists(st.fixed_dictionaries({"text": JUNK}), max_size=2)))
    message = {"content": part}
    choice = data.draw(st.sampled_from([{"message": message, "finish_reason": data.draw(JUNK)}, None, message]))
    reply = data.draw(st.sampled_from([{"choices": [choice]}, {"choices": choice}, None, []]))
    try:
        judge_replies.content(json.dumps(reply, default=str).encode()).encode()
    except UnusableError as error:
        assert len(str(error).splitlines()) == 1 and "confidential" not in str(error)


@cases(100)
@given(
    body=st.one_of(st.binary(max_size=200), damaged(json.dumps({"choices": [{"message": {"content": "5"}}]}).encode()))
)
def test_any_bytes(body: bytes) -> None:
    try:
        judge_replies.content(body).encode()
    except UnusableError as error:
        assert len(str(error).splitlines()) == 1


COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Rating: [[5]]"}}],
}
ERROR = {"error": {"message": "confidential", "type": "bad", "param": "max_tokens", "code": "unsupported"}}
STATUSES = [200, 200, 200, 201, 204, 301, 400, 401, 404, 413, 422, 429, 500, 503]


@functools.cache
def client_of(url: str) -> OpenAiClient:
    return OpenAiClient(JudgeConfig(kind="openai", base_url=url, retries=0, timeout_s=20.0))


@cases(120)
@given(data=st.data())
def test_any_body_with_any_status(endpoint: Any, data: st.DataObject) -> None:
    status = data.draw(st.sampled_from(STATUSES))
    whole = json.dumps(COMPLETION if status < 300 else ERROR).encode()
    body = data.draw(
        st.one_of(
            damaged(whole), misshapen(json.loads(whole)).map(lambda value: json.dumps(value, default=str).encode())
        )
    )
    headers = {"retry-after": data.draw(st.sampled_from(["1e999", "soon", "-1", "Mon, 01 Jan 99999 00:00:00 GMT"]))}
    endpoint.answer = lambda number, request: endpoint.Answer(b"" if status == 204 else body, status, headers)
    client = client_of(endpoint.url)
    try:
        judgment = asyncio.run_coroutine_threadsafe(client.ask(MATCH), request_loop()).result(30.0)
    except (TurnError, JudgeError) as error:
        text = str(error)
        assert text.startswith("judge 'gpt-4' at http://127.0.0.1") and len(text.splitlines()) == 1
        assert "confidential" not in text
        return
    judgment.encode()
    assert parse_rating(judgment) == UNRATED or 1 <= parse_rating(judgment) <= 10


HEADERS = [
    "0001 00:00:00 GMT",
    "99999 00:00:00 +9999",
    "Mon, 01 Jan 0001 00:00:00 +2359",
    "nan",
    "inf",
    "1_0",
    "\u0661",
]


@cases(60)
@given(value=st.one_of(ANY_TEXT, st.floats().map(str), st.sampled_from(HEADERS)))
def test_a_pause_is_finite_whatever_is_asked(value: str) -> None:
    asked = retry_after_s({"retry-after": value})
    assert asked is None or 0 <= asked < float("inf")
