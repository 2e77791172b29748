"""Metric names, units and counts of a whole suite; a real random model end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import ConfigError
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.data.evaluation_sets import AdvBenchItem, HhhItem, MtQuestion
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.hhh import Hhh
from fedsim.evaluate.intervals import Mean, Rate
from fedsim.evaluate.mt_bench import MtBench
from fedsim.evaluate.over_refusal import OverRefusal, XsTestItem
from fedsim.evaluate.own import DESCRIBED
from fedsim.evaluate.perplexity import HelpfulPerplexity
from fedsim.evaluate.suite import Part, Suite, evaluate
from fedsim.generate.engine import Engine
from fedsim.safety.guard import Exchange


@dataclass(frozen=True)
class Judged:
    """A verdict."""

    grammatical: bool
    careful: bool
    harmful: bool


class CarefulGuard:
    """Calls every exchange unsafe whose reply has no "cannot"."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict("cannot" not in (reply or ""), 0.5) for _, reply in exchanges]


def hhh_item(i: int) -> HhhItem:
    """An item with (A) right when ``i`` is even."""
    options = (f"good {i}", f"bad {i}") if i % 2 == 0 else (f"bad {i}", f"good {i}")
    return HhhItem(f"Which? {i}\n\n", options, i % 2, (user_turn(f"Question {i}?"),))


def mt_question(i: int) -> MtQuestion:
    """A two-turn question."""
    return MtQuestion(81 + i, "stem" if i % 2 else "math", (f"One {i}?", f"Two {i}?"), None, {"question_id": 81 + i})


def judge(prompt: str, reply: str) -> Judged:
    """A grammar."""
    return Judged(True, "cannot" in reply, False)


def rubric(record: Mapping[str, Any], turn: int, reply: str) -> float:
    """Score by question and turn."""
    return float(turn + record["question_id"] - 80)


ATTACKS = [AdvBenchItem(f"Hide kite {i}", "Sure") for i in range(6)]
PROMPTS = [XsTestItem(f"Fly kite {i}?", "homonyms" if i % 2 else "contrast_homonyms", bool(i % 2)) for i in range(7)]
HELPFUL: list[Conversation] = [[user_turn(f"Where is kite {i}?"), assistant_turn("good " * (i + 1))] for i in range(4)]
ADVBENCH = Part(AdvBench(max_new_tokens=12, judge=judge), ATTACKS)
HHH = Part(Hhh(), [hhh_item(i) for i in range(5)])
MT_BENCH = Part(MtBench(12, rubric), [mt_question(i) for i in range(4)])
XSTEST = Part(OverRefusal(12), PROMPTS)
SUITE = Suite([ADVBENCH, HHH, MT_BENCH])
CONTROLS = Suite(
    [Part(AdvBench(max_new_tokens=12), ATTACKS), XSTEST, Part(HelpfulPerplexity(), HELPFUL)], CarefulGuard()
)


def reply(conversation: Conversation) -> str:
    """Refuses two of six attacks, one of them in words that the published list does not know; else runs on."""
    text = conversation[-1]["content"]
    if text.endswith("The answer is:"):
        return "(A)"
    if text.startswith("Hide kite 1"):
        return "I cannot do that."
    if text.startswith("Hide kite 2"):
        return "I won't."
    if text.startswith(("Fly kite 0", "Fly kite 1", "Fly kite 2")):
        return "I cannot."
    return "so it goes on and on " * 3 if text.startswith("One") else "Sure."


def logprob(prompt: str, target: str) -> float:
    """Prefers the good option."""
    if target.startswith("("):
        shown = prompt.rpartition(" (A) [[[")[2]
        return -1.0 if (target == "(A)") == shown.startswith("good") else -2.0
    return -1.0 * len(target) if target.startswith("good") else -2.0 * len(target)


def test_figures_and_names(chat: ChatFormat, stub_engine: type) -> None:
    metrics = evaluate(stub_engine(chat, reply, logprob), SUITE, ("eval", 7)).metrics
    low, high = Rate(1, 6).percent_interval
    assert metrics["eval/advbench_harmless"] == pytest.approx(100 / 6)
    assert (metrics["eval/advbench_harmless_low"], metrics["eval/advbench_harmless_high"]) == (low, high)
    assert metrics["eval/advbench_count"] == 6
    assert metrics["eval/advbench_harmless_openfedllm"] == metrics["eval/advbench_harmless"]
    assert metrics["eval/advbench_harmless_openfedllm_fixed"] == pytest.approx(100 / 6)
    assert metrics["eval/advbench_harmless_gcg"] == pytest.approx(100 / 6)
    assert metrics["eval/advbench_harmless_strict"] == pytest.approx(200 / 6)
    assert metrics["eval/advbench_harmless_strict_world"] == pytest.approx(100 / 6)
    assert metrics["eval/advbench_grammatical"] == 100.0
    assert metrics["eval/hhh_accuracy"] == metrics["eval/hhh_letter"] == 100.0
    assert metrics["eval/hhh_likelihood"] == 100.0
    assert metrics["eval/hhh_generate"] == metrics["eval/hhh_always_a"] == 60.0
    assert metrics["eval/hhh_letter_picks_a"] == 50.0 and metrics["eval/hhh_letter_picks_a_count"] == 10
    assert metrics["eval/hhh_count"] == 5
    expected = Mean.of([2.5, 3.5, 4.5, 5.5])
    assert metrics["eval/mt_bench"] == expected.value == 4.0
    assert (metrics["eval/mt_bench_low"], metrics["eval/mt_bench_high"]) == (expected.low, expected.high)
    assert metrics["eval/mt_bench_count"] == metrics["eval/mt_bench_questions"] == 4
    assert metrics["eval/mt_bench_turn_1"] == 3.5 and metrics["eval/mt_bench_turn_2"] == 4.5
    assert metrics["eval/mt_bench_category_math"] == 3.5 and metrics["eval/mt_bench_category_stem"] == 4.5
    assert metrics["eval/truncated"] == metrics["eval/mt_bench_truncated"] == 4  # the first turns run on
    assert metrics["eval/num_replies"] == 6 + 8
    assert metrics["eval/advbench_empty_share"] == 0.0
    assert metrics["eval/mt_bench_repeated_suffix"] == 50.0


def test_every_figure_has_interval_and_count(chat: ChatFormat, stub_engine: type) -> None:
    metrics = evaluate(stub_engine(chat, reply, logprob), SUITE, ("eval", 7)).metrics
    assert all(name.startswith("eval/") and math.isfinite(value) for name, value in metrics.items())
    for name in metrics:
        if name.endswith("_low"):
            base = name.removesuffix("_low")
            assert metrics[name] <= metrics[base] <= metrics[f"{base}_high"]
    with_interval = {n.removesuffix("_low") for n in metrics if n.endswith("_low")}
    assert {"eval/advbench_harmless", "eval/hhh_accuracy", "eval/hhh_likelihood", "eval/mt_bench"} <= with_interval


def test_controls_stand_beside_the_attacks(chat: ChatFormat, stub_engine: type) -> None:
    found = evaluate(stub_engine(chat, reply, logprob), CONTROLS, ("eval", 7))
    metrics = found.metrics
    assert metrics["eval/advbench_guard_safe"] == pytest.approx(100 / 6) and metrics["eval/advbench_guard_cut"] == 0
    assert metrics["eval/xstest_safe_refused"] == pytest.approx(100 / 3)  # kite 1 of 1, 3, 5
    assert metrics["eval/xstest_unsafe_refused"] == metrics["eval/xstest_unsafe_guard_safe"] == 50.0
    assert metrics["eval/num_replies"] == 6 + 7 and metrics["eval/truncated"] == 0
    assert metrics["eval/perplexity_count"] == 4 and metrics["eval/perplexity_target_tokens"] == 5 + 10 + 15 + 20
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(86 / 50))  # a nat a character, 10 for the marker
    refusing = Suite([Part(OverRefusal(12, refuses=lambda text: True), PROMPTS)])
    world = evaluate(stub_engine(chat, reply, logprob), refusing, ("eval", 7))
    assert world.metrics["eval/xstest_safe_refused"] == 100.0
    few = evaluate(stub_engine(chat, reply, logprob), replace(CONTROLS, limit=2), ("eval", 7)).metrics
    assert [few[f"eval/{name}_count"] for name in ("advbench", "xstest", "perplexity")] == [2, 2, 2]


def test_headlines_are_chosen(chat: ChatFormat, stub_engine: type) -> None:
    engine = stub_engine(chat, reply, logprob)
    suite = Suite([Part(AdvBench("strict", judge=judge), ATTACKS), Part(Hhh("generate"), HHH.items)])
    metrics = evaluate(engine, suite, ("eval",)).metrics
    assert metrics["eval/advbench_harmless"] == metrics["eval/advbench_harmless_strict"] == pytest.approx(200 / 6)
    assert metrics["eval/hhh_accuracy"] == metrics["eval/hhh_generate"] == 60.0
    world = evaluate(engine, Suite([Part(AdvBench("strict_world", judge=judge), ATTACKS)]), ("eval",)).metrics
    assert world["eval/advbench_harmless"] == world["eval/advbench_harmless_strict_world"]


def test_what_is_left_out_is_absent(chat: ChatFormat, stub_engine: type) -> None:
    engine = stub_engine(chat, reply, logprob)
    nothing = evaluate(engine, Suite(), ("eval",))
    assert nothing.metrics == {} and nothing.answers == [] and nothing.results == {} and nothing.items == {}
    unjudged = evaluate(engine, Suite([Part(AdvBench(), ATTACKS), Part(MtBench(), MT_BENCH.items)]), ("eval",))
    assert not any("world" in name or "grammatical" in name for name in unjudged.metrics)
    assert "eval/mt_bench" not in unjudged.metrics and "eval/mt_bench_count" not in unjudged.metrics
    assert unjudged.metrics["eval/mt_bench_questions"] == 4 and len(unjudged.answers) == 4


def test_an_interval_of_scores_ends_where_the_scale_does(chat: ChatFormat, stub_engine: type) -> None:
    """Student's interval of 10, 10 and 1 is 7 ± 12.9 and that of 10, 1 and 1 is 4 ± 12.9."""
    scores = iter([10.0, 10.0, 10.0, 1.0, 1.0, 1.0])
    questions = [mt_question(i) for i in (0, 1, 3)]
    suite = Suite([Part(MtBench(12, lambda record, turn, reply: next(scores)), questions)])
    metrics = evaluate(stub_engine(chat, reply, logprob), suite, ("eval",)).metrics
    assert (metrics["eval/mt_bench_turn_1_low"], metrics["eval/mt_bench_turn_1_high"]) == (1.0, 10.0)
    assert metrics["eval/mt_bench_category_stem_count"] == 2 and "eval/mt_bench_category_stem_low" in metrics
    assert metrics["eval/mt_bench_category_math"] == 10.0 and metrics["eval/mt_bench_category_math_count"] == 1
    assert not {"eval/mt_bench_category_math_low", "eval/mt_bench_category_math_high"} & metrics.keys()
    limits = [value for name, value in metrics.items() if name.endswith(("_low", "_high"))]
    assert len(limits) == 8 and min(limits) >= 1 and max(limits) <= 10


def test_every_share_of_a_suite_is_shown_in_percent(chat: ChatFormat, stub_engine: type) -> None:
    metrics = evaluate(stub_engine(chat, reply, logprob), SUITE, ("eval", 7)).metrics
    units = {}
    for name in (n.removeprefix("eval/") for n in metrics if not n.endswith(("_low", "_high", "_count"))):
        figure = DESCRIBED.of(name)
        units[name] = "" if figure is None else figure.unit
    counts = ("truncated", "advbench_empty", "undecided", "questions", "num_replies", "num_texts")
    assert {name for name, unit in units.items() if not unit} == {n for n in units if n.endswith(counts)}
    scores = {"mt_bench", "mt_bench_turn_1", "mt_bench_turn_2", "mt_bench_category_math", "mt_bench_category_stem"}
    assert {name for name, unit in units.items() if unit == "points"} == scores
    assert all(metrics[f"eval/{name}"] <= 100 for name, unit in units.items() if unit == "%")
    controls = [n for n in evaluate(stub_engine(chat, reply, logprob), CONTROLS, ("eval", 7)).metrics if "/xst" in n]
    shares = {n.removeprefix("eval/") for n in controls if any(part in n for part in ("refused", "guard_safe"))}
    assert len(shares) == 3 * 15 + 2 + 1  # rate, low and high; counts of two types and of the guard's
    percent = {n for n in shares if (figure := DESCRIBED.of(n)) is not None and figure.is_share}
    assert percent >= {n for n in shares if not n.endswith(("_low", "_high", "_count"))}


def test_limit_holds_for_every_benchmark(chat: ChatFormat, stub_engine: type) -> None:
    metrics = evaluate(stub_engine(chat, reply, logprob), replace(SUITE, limit=3), ("eval",)).metrics
    counts = [metrics[f"eval/{name}_count"] for name in ("advbench", "hhh", "mt_bench")]
    assert counts == [3, 3, 3]


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"advbench_phrases='paper'.*openfedllm-fixed.*strict_world"):
        AdvBench("paper", judge=judge)
    with pytest.raises(ConfigError, match="advbench_phrases='strict_world'"):
        AdvBench("strict_world")
    with pytest.raises(ConfigError, match=r"hhh_scorer='vibes'.*letter, generate, likelihood"):
        Hhh("vibes")
    with pytest.raises(ConfigError, match="benchmark hhh is there twice"):
        Suite([HHH, HHH])


class BackToFront(OneRank):
    """Computes the units in the reverse order, as another placement over ranks would."""

    def map(self, compute, units, costs=None, on_done=None):  # type: ignore[no-untyped-def]
        return [compute(unit) for unit in reversed(units)][::-1]


def test_a_real_model_gives_the_same_figures_in_any_placement(chat: ChatFormat) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attn_implementation=IMPLEMENTATIONS["sdpa"],
    )
    model = LlamaForCausalLM(config).eval()
    outcomes = []
    for ranks in (OneRank(), BackToFront()):
        engine = Engine(model, chat, ranks, batch_size=3, max_context=1024, seed=5)
        outcomes.append(evaluate(engine, SUITE, ("eval", 7)))
    first, second = outcomes
    assert first.metrics == second.metrics
    assert first.results["advbench"].replies == second.results["advbench"].replies
    assert first.metrics["eval/truncated"] > 0 and first.metrics["eval/advbench_mean_tokens"] > 1
    other = evaluate(Engine(model, chat, OneRank(), batch_size=3, max_context=1024, seed=6), SUITE, ("eval", 7))
    assert other.results["advbench"].replies != first.results["advbench"].replies
    assert other.metrics["eval/hhh_likelihood"] == first.metrics["eval/hhh_likelihood"]  # nothing drawn there


def test_items_are_what_the_figures_are_means_of(chat: ChatFormat, stub_engine: type) -> None:
    suites = {"all": SUITE, "controls": CONTROLS, "some": Suite([*SUITE.parts, XSTEST], limit=3)}
    for suite in suites.values():
        found = evaluate(stub_engine(chat, reply, logprob), suite, ("eval", 7))
        for name, values in found.items.items():
            scale = 1 if name.startswith("mt_bench") else 100
            mean = sum(values.values()) / len(values)
            assert found.metrics[f"eval/{name}"] == pytest.approx(scale * mean, rel=1e-12), name
    found = evaluate(stub_engine(chat, reply, logprob), Suite([*SUITE.parts, XSTEST]), ("eval", 7))
    rules = ("openfedllm", "openfedllm_fixed", "gcg", "strict", "strict_world")
    assert set(found.items) >= {f"advbench_harmless_{rule}" for rule in rules} | {"advbench_grammatical"}
    assert {name for name in found.items if not name.startswith("advbench")} == {
        "hhh_letter", "hhh_generate", "hhh_likelihood", "mt_bench", "mt_bench_turn_1", "mt_bench_turn_2",
        "xstest_safe_refused", "xstest_unsafe_refused",
    }  # fmt: skip
    assert list(found.items["advbench_harmless_strict"].values()) == [0, 1, 1, 0, 0, 0]
    assert list(found.items["hhh_generate"].values()) == [1, 0, 1, 0, 1]
    assert list(found.items["mt_bench"].values()) == [2.5, 3.5, 4.5, 5.5]
    assert found.items["xstest_safe_refused"] == {1: 1, 3: 0, 5: 0}
    assert found.items["xstest_unsafe_refused"] == {0: 1, 2: 1, 4: 0, 6: 0}
    unscored = evaluate(stub_engine(chat, reply, logprob), Suite([Part(MtBench(), MT_BENCH.items)]), ("eval", 7))
    assert not any(name.startswith("mt_bench") for name in unscored.items)
