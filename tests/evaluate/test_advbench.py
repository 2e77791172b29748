"""AdvBench counts on hand-made replies."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fedsim.data.benchmarks import AdvBenchItem
from fedsim.data.chat import ChatFormat, Conversation, user_turn
from fedsim.evaluate.advbench import ask_advbench, summarise_attacks
from fedsim.evaluate.asking import answer
from fedsim.evaluate.intervals import Rate
from fedsim.generate.engine import Engine, Reply, Sampling

ITEMS = [AdvBenchItem(f"Hide kite {i}", "Sure, here is a plan") for i in range(8)]
REPLIES = [
    "I am sorry, but I cannot help.",
    "Sure, hide it at night.",
    "",
    "I can't help with that.",
    "That has an end.",
    "Sure. I cannot wait. Sorry.",
    "No, leave it alone.",
    "word " * 30,
]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=20)


@dataclass(frozen=True)
class Judged:
    """A verdict of the little grammar below."""

    grammatical: bool
    careful: bool
    harmful: bool


def judge(prompt: str, reply: str) -> Judged:
    """Sentences end with a full stop; "cannot" is careful, "night" harmful; the prompt must be a sentence."""
    assert prompt.endswith(".")
    return Judged(reply.endswith("."), "cannot" in reply, "night" in reply)


def test_every_figure_by_hand(chat: ChatFormat, stub_engine: type) -> None:
    by_prompt = {item.prompt: reply for item, reply in zip(ITEMS, REPLIES, strict=True)}

    def reply(conversation: Conversation) -> str:
        assert len(conversation) == 1
        return by_prompt[conversation[0]["content"]]

    engine = stub_engine(chat, reply=reply)
    result = answer(engine, ask_advbench(ITEMS, SAMPLING, ("eval", 3)))
    [(conversations, sampling, key)] = engine.calls
    assert conversations[0] == [user_turn("Hide kite 0.")]  # the goal and a full stop
    assert (sampling, key) == (SAMPLING, ("eval", 3))
    assert result.harmless == {
        "openfedllm": Rate(3, 8),  # 0, 4 ("has an"), 5
        "openfedllm-fixed": Rate(4, 8),  # and 6
        "gcg": Rate(2, 8),  # 0, 5
        "strict": Rate(3, 8),  # 0, 3, 6
    }
    assert "strict_world" not in result.harmless and result.grammatical is None
    assert (result.count, result.num_truncated, result.num_prompts_truncated, result.num_empty) == (8, 1, 0, 1)
    assert result.mean_tokens == pytest.approx(sum(len(r.split()) + 1 for r in REPLIES) / 8)
    assert result.collapse.empty == 1 / 8 and result.collapse.repeated_suffix == 1 / 8
    assert [r.text for r in result.replies] == REPLIES


def test_the_grammar_of_an_embedded_world_judges_too() -> None:
    replies = [
        Reply("I cannot.", 3, False),
        Reply("I cannot", 3, False),
        Reply("Go at night. I cannot.", 6, False),
        Reply("Well.", 2, True, prompt_truncated=True),
    ]
    result = summarise_attacks([item.prompt for item in ITEMS[:4]], replies, judge)
    assert result.harmless["strict_world"] == Rate(1, 4)
    assert result.grammatical == Rate(3, 4)
    assert (result.num_truncated, result.num_prompts_truncated) == (1, 1)


def test_limit_asks_fewer(chat: ChatFormat, stub_engine: type) -> None:
    engine: Engine = stub_engine(chat, reply=lambda conversation: "No.")
    assert answer(engine, ask_advbench(ITEMS, SAMPLING, ("eval",), limit=3)).count == 3


def test_texts_do_not_show_in_representations(chat: ChatFormat, stub_engine: type) -> None:
    """A traceback or a log that shows a result must not show prompts or replies."""
    engine = stub_engine(chat, reply=lambda conversation: "unspeakable")
    shown = repr(answer(engine, ask_advbench(ITEMS, SAMPLING, ("eval",)))) + repr(ITEMS)
    assert "unspeakable" not in shown and "Hide" not in shown
