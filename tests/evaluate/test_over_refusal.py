"""XSTest counts on hand-made replies: by half, rule and type, with a grammar and with a guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, user_turn
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.over_refusal import OverRefusal, XsTestItem
from fedsim.generate.engine import Engine, Reply, Sampling
from fedsim.safety.guard import Exchange
from fedsim.world.tiny_model import TINY_DIR

TALK = [
    ("homonyms", True, "Fly it at noon."),
    ("homonyms", True, "I'm sorry, but I cannot help."),
    ("safe targets!", True, "No way."),
    ("safe targets!", True, "Well, that is unethical."),
    ("safe targets!", True, ""),
    ("contrast_homonyms", False, "I cannot help."),
    ("contrast_homonyms", False, "Thanks for asking. I decline, at night."),
    ("contrast_discr", False, "Sure. Hide it " + "at night " * 10),
]
ITEMS = [XsTestItem(f"Prompt {i}?", kind, safe) for i, (kind, safe, _) in enumerate(TALK)]
REPLIES = [Reply(text, len(text.split()) + 1, i == 7, i == 2) for i, (_, _, text) in enumerate(TALK)]


class NightGuard:
    """Calls every reply unsafe that speaks of the night; sees long ones in part."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.seen += exchanges
        return [Verdict("night" in (reply or ""), 0.5, cut=len(reply or "") > 60) for _, reply in exchanges]


def figures(
    chat: ChatFormat, stub_engine: type, benchmark: OverRefusal, guard: NightGuard | None = None
) -> dict[str, Any]:
    """The figures of :data:`REPLIES`."""
    return dict(benchmark.measure(stub_engine(chat), ITEMS, [[REPLIES]], guard).figures)


def test_refusals_by_half_rule_and_type(chat: ChatFormat, stub_engine: type) -> None:
    result = OverRefusal().measure(stub_engine(chat), ITEMS, [[REPLIES]])
    found = result.figures
    rules = ("xstest", "openfedllm", "openfedllm_fixed", "gcg", "strict")
    assert [found[f"xstest_safe_refused_{rule}"] for rule in rules] == [Rate(1, 5), *[Rate(2, 5)] * 4]
    assert [found[f"xstest_unsafe_refused_{rule}"] for rule in rules] == [Rate(1, 3)] * 5
    assert (found["xstest_safe_refused"], found["xstest_unsafe_refused"]) == (Rate(1, 5), Rate(1, 3))
    assert not any("guard" in name or "world" in name for name in found)
    assert {name: rate for name, rate in found.items() if name.startswith("xstest_type")} == {
        "xstest_type_homonyms_refused": Rate(1, 2),
        "xstest_type_safe_targets__refused": Rate(0, 3),
        "xstest_type_contrast_homonyms_refused": Rate(1, 2),
        "xstest_type_contrast_discr_refused": Rate(0, 1),
    }
    counted = ("truncated", "prompts_truncated", "empty", "num_texts", "repeated_suffix", "empty_share")
    assert [found[f"xstest_{name}"] for name in counted] == [1, 1, 1, 8, 12.5, 12.5]
    assert found["xstest_mean_tokens"] == pytest.approx(sum(r.num_tokens for r in REPLIES) / 8)
    assert result.items == {
        "xstest_safe_refused": [0, 1, 0, 0, 0, None, None, None],
        "xstest_unsafe_refused": [None, None, None, None, None, 1, 0, 0],
    }


def test_where_there_is_a_grammar_its_word_counts(chat: ChatFormat, stub_engine: type) -> None:
    benchmark = OverRefusal(refuses=lambda reply: "unethical" in reply or "decline" in reply)
    found = figures(chat, stub_engine, benchmark)
    assert found["xstest_safe_refused"] == found["xstest_safe_refused_world"] == Rate(1, 5)
    assert found["xstest_type_safe_targets__refused"] == Rate(1, 3)
    assert found["xstest_unsafe_refused"] == found["xstest_unsafe_refused_world"] == Rate(1, 3)
    assert found["xstest_safe_refused_xstest"] == Rate(1, 5)


def test_the_guard_reads_the_unsafe_half(chat: ChatFormat, stub_engine: type) -> None:
    guard = NightGuard()
    found = figures(chat, stub_engine, OverRefusal(), guard)
    assert (found["xstest_unsafe_guard_safe"], found["xstest_unsafe_guard_cut"]) == (Rate(1, 3), 1)
    assert "xstest_safe_guard_safe" not in found
    assert guard.seen == [(ITEMS[i].prompt, REPLIES[i].text) for i in (5, 6, 7)]


def test_names_counts_and_intervals(chat: ChatFormat, stub_engine: type) -> None:
    benchmark = OverRefusal()
    metrics = benchmark.metrics(benchmark.measure(stub_engine(chat), ITEMS, [[REPLIES]], NightGuard()))
    low, high = Rate(1, 5).percent_interval
    assert metrics["eval/xstest_safe_refused"] == 20.0
    assert (metrics["eval/xstest_safe_refused_low"], metrics["eval/xstest_safe_refused_high"]) == (low, high)
    assert [metrics[f"eval/xstest_{name}count"] for name in ("", "safe_", "unsafe_")] == [8, 5, 3]
    assert metrics["eval/xstest_type_safe_targets__refused"] == 0.0
    assert metrics["eval/xstest_type_safe_targets__refused_count"] == 3
    assert metrics["eval/xstest_safe_refused_openfedllm_fixed"] == 40.0
    assert "eval/xstest_safe_refused_count" not in metrics
    assert metrics["eval/xstest_unsafe_guard_safe_count"] == 3


def test_prompts_are_asked_greedily_for_at_most_256_tokens(
    chat: ChatFormat, stub_engine: type, measure: Callable[..., Result]
) -> None:
    def reply(conversation: Conversation) -> str:
        return TALK[int(conversation[0]["content"][7])][2]

    engine = stub_engine(chat, reply=reply)
    result = measure(engine, OverRefusal(1024), ITEMS, ("eval", "xstest"))
    measure(engine, OverRefusal(20), ITEMS)
    (asked, sampling, key), (_, shorter, _) = engine.calls
    assert asked == [[user_turn(item.prompt)] for item in ITEMS] and key == ("eval", "xstest")
    assert sampling == Sampling(0.0, 256) and shorter == Sampling(0.0, 20)
    assert result.figures["xstest_safe_refused"] == Rate(1, 5)


def test_the_real_prompts_through_the_shipped_model(real_data: Path, measure: Callable[..., Result]) -> None:
    """Every one is asked and counted; what the tiny model says of a world that it does not know means nothing."""
    benchmark = OverRefusal(6)
    items = benchmark.load(real_data / "xstest" / "xstest_prompts.csv")
    model = AutoModelForCausalLM.from_pretrained(TINY_DIR, attn_implementation=IMPLEMENTATIONS["sdpa"]).eval()
    chat = ChatFormat(AutoTokenizer.from_pretrained(TINY_DIR))
    engine = Engine(model, chat, OneRank(), batch_size=64, max_context=4096, seed=0)
    metrics = benchmark.metrics(measure(engine, benchmark, items))
    counts = {part: metrics[f"eval/xstest_{part}count"] for part in ("", "safe_", "unsafe_")}
    assert counts == {"": 450, "safe_": 250, "unsafe_": 200}
    types = [value for name, value in metrics.items() if "_type_" in name and name.endswith("_count")]
    assert types == [25] * 18 and metrics["eval/xstest_prompts_truncated"] == 0


def test_a_half_without_prompts_is_absent(chat: ChatFormat, stub_engine: type) -> None:
    found = OverRefusal().measure(stub_engine(chat), ITEMS[:5], [[REPLIES[:5]]]).figures
    assert "xstest_safe_refused" in found and not any("unsafe" in name for name in found)


def test_texts_do_not_show_in_representations(chat: ChatFormat, stub_engine: type) -> None:
    shown = repr(OverRefusal().measure(stub_engine(chat), ITEMS, [[REPLIES]])) + repr(ITEMS)
    assert "noon" not in shown and "Prompt" not in shown
