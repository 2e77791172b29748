"""A local model as the judge: greedy, in order, and no judgment of a prompt that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsim.base.errors import ModelError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.chat import ChatFormat, Conversation
from fedsim.evaluate.fastchat import CUT, NOT_ASKED
from fedsim.evaluate.judge_contract import Work
from fedsim.evaluate.judge_inputs import build_judge
from fedsim.evaluate.judge_local import LocalJudge, judge_with
from fedsim.evaluate.judge_prompts import Match, parse_rating


def match(number: int, user: str, system: str = "Be fair.") -> Match:
    """A match with a text of its own."""
    return Match(number, 1, "single-v1", system, user)


def test_what_fits_is_asked_greedily_and_what_does_not_is_not(chat: ChatFormat, stub_engine: type) -> None:
    def reply(conversation: Conversation) -> str:
        return f"{conversation[-1]['content']}: Rating: [[{len(conversation)}]]"

    engine = stub_engine(chat, reply=reply, max_context=400)
    matches = [match(81, "short"), match(82, "x" * 500), match(83, "no system", system="")]
    judgments = [str(text) for text in judge_with(engine, matches, [0, 1, 2], 100)]
    assert [parse_rating(j) for j in judgments] == [2, -1, 1]
    assert judgments[0].startswith("short: ") and judgments[2].startswith("no system: ")
    assert judgments[1].startswith(NOT_ASKED) and "leaves room for 300 of them" in judgments[1]
    ((conversations, sampling, _),) = engine.calls
    assert conversations == [matches[0].conversation, matches[2].conversation]
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 100)
    assert judge_with(engine, matches, [0], 100) == judgments  # all that fit, for the sake of one
    assert len(engine.calls) == 2
    assert judge_with(engine, matches, [1], 100) == [None, judgments[1], None]  # it still does not fit
    assert len(engine.calls) == 2


def test_a_judgment_that_does_not_end_is_marked_as_cut(chat: ChatFormat, stub_engine: type) -> None:
    engine = stub_engine(chat, reply=lambda c: "Rating: [[5]]" + " so" * len(c[-1]["content"]))
    judgments = judge_with(engine, [match(81, "x"), match(82, "x" * 9)], [0, 1], 8)
    assert judgments == ["Rating: [[5]] so", f"{CUT}Rating: [[5]]{' so' * 9}"]
    assert [parse_rating(str(text)) for text in judgments] == [5, -1]


def test_the_reply_has_at_most_half_of_the_context(chat: ChatFormat, stub_engine: type) -> None:
    engine = stub_engine(chat, reply=lambda c: "[[5]]", max_context=400)
    length = len(chat.prompt_ids(match(81, "").conversation))
    fits, too_long = match(81, "x" * (200 - length)), match(82, "x" * (201 - length))
    assert [parse_rating(str(j)) for j in judge_with(engine, [fits, too_long], [0, 1], 2048)] == [5, -1]
    assert engine.calls[0][1].max_new_tokens == 200
    assert parse_rating(str(judge_with(engine, [too_long], [0], 2048)[0])) == -1 and len(engine.calls) == 1


def test_a_template_without_system_messages_is_an_error(
    make_bytes_chat: Callable[..., ChatFormat], stub_engine: type
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    engine = stub_engine(make_bytes_chat(template), reply=lambda c: "[[5]]")
    assert judge_with(engine, [match(81, "x", system="")], [0], 10) == ["[[5]]"]
    with pytest.raises(ModelError, match=r"cannot write a conversation of the roles system, user: no system role"):
        judge_with(engine, [match(81, "x")], [0], 10)


def test_a_model_from_its_directory(llama_dir: Path) -> None:
    words = ["judge.kind=local", f"judge.path={llama_dir}", "judge.max_new_tokens=8", "eval.batch_size=2"]
    config = load_config(None, words)
    matches = [match(81 + i, "Rate this kite. " * i) for i in range(4)]
    seen: list[tuple[int, int]] = []

    def judged(config: Config) -> list[str | None]:
        judge = build_judge(config)
        assert isinstance(judge, LocalJudge)
        work = Work(matches, range(4), OneRank(), torch.device("cpu"), lambda match, judgment: None,
                    lambda done, total: seen.append((done, total)))  # fmt: skip
        return judge.judgments(work)

    judgments = judged(config)
    assert len(judgments) == 4 and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert judged(config) == judgments
    with pytest.raises(ModelError, match=r"judge\.path='absent': "):
        judged(load_config(None, [*words, "judge.path=absent"]))
