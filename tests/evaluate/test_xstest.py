"""XSTest counts on hand-made replies: by half, rule and type, with a grammar and with a guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.data.chat import ChatFormat, Conversation, user_turn
from fedsim.data.xstest import XsTestItem, load_xstest
from fedsim.evaluate.asking import answer
from fedsim.evaluate.guard_judge import GuardJudgement
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.xstest import ask_xstest, summarise_xstest
from fedsim.generate.engine import Engine, Reply, Sampling
from fedsim.model.tiny_model import TINY_DIR
from fedsim.ranks import OneRank
from fedsim.safety.guard import Exchange
from fedsim.safety.verdict import Verdict

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


def test_refusals_by_half_rule_and_type() -> None:
    result = summarise_xstest(ITEMS, REPLIES)
    assert result.safe is not None and result.unsafe is not None
    assert result.safe.refused == {
        "xstest": Rate(1, 5),
        "openfedllm": Rate(2, 5),
        "openfedllm-fixed": Rate(2, 5),
        "gcg": Rate(2, 5),
        "strict": Rate(2, 5),
    }
    assert {rule: rate.successes for rule, rate in result.unsafe.refused.items()} == {
        "xstest": 1, "openfedllm": 1, "openfedllm-fixed": 1, "gcg": 1, "strict": 1,
    }  # fmt: skip
    assert result.safe.headline == "xstest" and result.safe.guard is None and result.unsafe.guard is None
    assert result.safe.by_type == {"homonyms": Rate(1, 2), "safe targets!": Rate(0, 3)}
    assert result.unsafe.by_type == {"contrast_homonyms": Rate(1, 2), "contrast_discr": Rate(0, 1)}
    assert (result.num_truncated, result.num_prompts_truncated, result.num_empty) == (1, 1, 1)
    assert result.mean_tokens == pytest.approx(sum(r.num_tokens for r in REPLIES) / 8)
    assert (result.collapse.num_texts, result.collapse.repeated_suffix, result.collapse.empty) == (8, 1 / 8, 1 / 8)


def test_where_there_is_a_grammar_its_word_counts() -> None:
    result = summarise_xstest(ITEMS, REPLIES, refuses=lambda reply: "unethical" in reply or "decline" in reply)
    assert result.safe is not None and result.unsafe is not None
    assert result.safe.headline == "world" and result.safe.refused["world"] == Rate(1, 5)
    assert result.safe.by_type["safe targets!"] == Rate(1, 3)
    metrics = result.metrics()
    assert (
        metrics["eval/xstest_unsafe_refused"] == metrics["eval/xstest_unsafe_refused_world"] == pytest.approx(100 / 3)
    )
    assert metrics["eval/xstest_safe_refused_xstest"] == 20.0


def test_the_guard_reads_the_unsafe_half() -> None:
    guard = NightGuard()
    result = summarise_xstest(ITEMS, REPLIES, guard=guard)
    assert result.safe is not None and result.safe.guard is None
    assert result.unsafe is not None and result.unsafe.guard == GuardJudgement(Rate(1, 3), 1)
    assert guard.seen == [(ITEMS[i].prompt, REPLIES[i].text) for i in (5, 6, 7)]
    metrics = result.metrics()
    assert metrics["eval/xstest_unsafe_guard_safe"] == pytest.approx(100 / 3)
    assert metrics["eval/xstest_unsafe_guard_safe_count"] == 3 and metrics["eval/xstest_unsafe_guard_cut"] == 1


def test_names_counts_and_intervals() -> None:
    metrics = summarise_xstest(ITEMS, REPLIES).metrics()
    low, high = Rate(1, 5).percent_interval
    assert metrics["eval/xstest_safe_refused"] == 20.0
    assert (metrics["eval/xstest_safe_refused_low"], metrics["eval/xstest_safe_refused_high"]) == (low, high)
    assert (metrics["eval/xstest_count"], metrics["eval/xstest_safe_count"], metrics["eval/xstest_unsafe_count"]) == (
        8,
        5,
        3,
    )
    assert metrics["eval/xstest_type_safe_targets__refused"] == 0.0
    assert metrics["eval/xstest_type_safe_targets__refused_count"] == 3
    assert metrics["eval/xstest_safe_refused_openfedllm_fixed"] == 40.0
    assert metrics["eval/xstest_repeated_suffix"] == metrics["eval/xstest_empty_share"] == 12.5


def test_prompts_are_asked_greedily_for_at_most_256_tokens(chat: ChatFormat, stub_engine: type) -> None:
    def reply(conversation: Conversation) -> str:
        return TALK[int(conversation[0]["content"][7])][2]

    engine = stub_engine(chat, reply=reply)
    result = answer(engine, ask_xstest(ITEMS, 1024, ("eval", "xstest")))
    answer(engine, ask_xstest(ITEMS, 20, ("eval", "xstest")))
    (asked, sampling, key), (_, shorter, _) = engine.calls
    assert asked == [[user_turn(item.prompt)] for item in ITEMS] and key == ("eval", "xstest")
    assert sampling == Sampling(0.0, 256) and shorter == Sampling(0.0, 20)
    assert result.safe is not None and result.safe.refused == summarise_xstest(ITEMS, REPLIES).safe.refused  # type: ignore[union-attr]
    assert len(answer(engine, ask_xstest(ITEMS, 20, ("eval",), limit=3)).replies) == 3


def test_the_real_prompts_through_the_shipped_model(real_data: Path) -> None:
    """Every one is asked and counted; what the tiny model says of a world that it does not know means nothing."""
    items = load_xstest(real_data / "xstest" / "xstest_prompts.csv")
    model = AutoModelForCausalLM.from_pretrained(TINY_DIR, attn_implementation=IMPLEMENTATIONS["sdpa"]).eval()
    chat = ChatFormat(AutoTokenizer.from_pretrained(TINY_DIR))
    engine = Engine(model, chat, OneRank(), batch_size=64, max_context=4096, seed=0)
    metrics = answer(engine, ask_xstest(items, 6, ("eval",))).metrics()
    counts = {part: metrics[f"eval/xstest_{part}count"] for part in ("", "safe_", "unsafe_")}
    assert counts == {"": 450, "safe_": 250, "unsafe_": 200}
    types = [value for name, value in metrics.items() if "_type_" in name and name.endswith("_count")]
    assert types == [25] * 18 and metrics["eval/xstest_prompts_truncated"] == 0


def test_a_half_without_prompts_is_absent() -> None:
    result = summarise_xstest(ITEMS[:5], REPLIES[:5])
    assert result.unsafe is None and result.safe is not None
    assert not any("unsafe" in name for name in result.metrics())


def test_texts_do_not_show_in_representations() -> None:
    shown = repr(summarise_xstest(ITEMS, REPLIES)) + repr(ITEMS)
    assert "noon" not in shown and "Prompt" not in shown
