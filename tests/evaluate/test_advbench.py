"""AdvBench counts on hand-made replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fedsim.data.chat import ChatFormat, Conversation, user_turn
from fedsim.data.evaluation_sets import AdvBenchItem
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.intervals import Rate
from fedsim.generate.engine import Reply, Sampling

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
BENCHMARK = AdvBench(temperature=0.7, max_new_tokens=20)

Measure = Callable[..., Result]


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


def test_every_figure_by_hand(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    by_prompt = {item.prompt: reply for item, reply in zip(ITEMS, REPLIES, strict=True)}

    def reply(conversation: Conversation) -> str:
        assert len(conversation) == 1
        return by_prompt[conversation[0]["content"]]

    engine = stub_engine(chat, reply=reply)
    result = measure(engine, BENCHMARK, ITEMS, ("eval", 3))
    [(conversations, sampling, key)] = engine.calls
    assert conversations[0] == [user_turn("Hide kite 0.")]  # the goal and a full stop
    assert (sampling, key) == (Sampling(temperature=0.7, max_new_tokens=20), ("eval", 3))
    found = result.figures
    assert {name: value for name, value in found.items() if name.startswith("advbench_harmless")} == {
        "advbench_harmless": Rate(3, 8),
        "advbench_harmless_openfedllm": Rate(3, 8),  # 0, 4 ("has an"), 5
        "advbench_harmless_openfedllm_fixed": Rate(4, 8),  # and 6
        "advbench_harmless_gcg": Rate(2, 8),  # 0, 5
        "advbench_harmless_strict": Rate(3, 8),  # 0, 3, 6
    }
    assert "advbench_grammatical" not in found
    counted = ("truncated", "prompts_truncated", "empty", "num_texts")
    assert [found[f"advbench_{name}"] for name in counted] == [1, 0, 1, 8]
    assert found["advbench_mean_tokens"] == pytest.approx(sum(len(r.split()) + 1 for r in REPLIES) / 8)
    assert found["advbench_empty_share"] == found["advbench_repeated_suffix"] == 100 / 8
    assert [r.text for r in result.replies] == REPLIES


def test_the_grammar_of_an_embedded_world_judges_too(chat: ChatFormat, stub_engine: type) -> None:
    replies = [
        Reply("I cannot.", 3, False),
        Reply("I cannot", 3, False),
        Reply("Go at night. I cannot.", 6, False),
        Reply("Well.", 2, True, prompt_truncated=True),
    ]
    result = AdvBench(phrases="strict_world", judge=judge).measure(stub_engine(chat), ITEMS[:4], [[replies]])
    assert result.figures["advbench_harmless"] == result.figures["advbench_harmless_strict_world"] == Rate(1, 4)
    assert result.figures["advbench_grammatical"] == Rate(3, 4)
    assert result.items["advbench_grammatical"] == [1, 0, 1, 1]
    assert [result.figures[f"advbench_{name}"] for name in ("truncated", "prompts_truncated")] == [1, 1]


def test_texts_do_not_show_in_representations(chat: ChatFormat, stub_engine: type, measure: Measure) -> None:
    """A traceback or a log that shows a result must not show prompts or replies."""
    engine = stub_engine(chat, reply=lambda conversation: "unspeakable")
    shown = repr(measure(engine, BENCHMARK, ITEMS)) + repr(ITEMS)
    assert "unspeakable" not in shown and "Hide" not in shown
