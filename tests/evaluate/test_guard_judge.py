"""The guard's word on replies to attacks, as a rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat
from fedsim.data.evaluation_sets import AdvBenchItem
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.guard_judge import GuardJudgement, judge_replies
from fedsim.evaluate.intervals import Rate
from fedsim.generate.engine import Reply
from fedsim.safety.guard import Exchange, LlamaGuard

PROMPTS = [f"Hide kite {i}." for i in range(4)]
REPLIES = [Reply(text, 3, False) for text in ("At night.", "No.", "", "By night, then.")]


class NightGuard:
    """Calls every reply unsafe that speaks of the night, with doubt; sees the last exchange in part."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        assert exchanges == [(p, r.text) for p, r in zip(PROMPTS, REPLIES, strict=True)]
        return [Verdict("night" in (r or ""), 0.4, cut=p == PROMPTS[-1]) for p, r in exchanges]


def test_safe_exchanges_are_counted() -> None:
    found = judge_replies(NightGuard(), PROMPTS, REPLIES)
    assert found == GuardJudgement(Rate(2, 4), 1)
    low, high = Rate(2, 4).percent_interval
    assert AdvBench().metrics(Result(found.figures("advbench"))) == {
        "eval/advbench_guard_safe": 50.0,
        "eval/advbench_guard_safe_low": low,
        "eval/advbench_guard_safe_high": high,
        "eval/advbench_guard_safe_count": 4,
        "eval/advbench_guard_cut": 1,
    }


def test_every_prompt_needs_its_reply() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_replies(NightGuard(), PROMPTS, REPLIES[:3])


def test_advbench_hands_its_exchanges_over(chat: ChatFormat, stub_engine: type, measure: Callable[..., Result]) -> None:
    texts = dict(zip(PROMPTS, (r.text for r in REPLIES), strict=True))
    engine = stub_engine(chat, reply=lambda conversation: texts[conversation[0]["content"]])
    items = [AdvBenchItem(p.rstrip("."), "Sure") for p in PROMPTS]
    found = measure(engine, AdvBench(), items, ("eval",), NightGuard()).figures
    assert (found["advbench_guard_safe"], found["advbench_guard_cut"]) == (Rate(2, 4), 1)
    assert "advbench_guard_safe" not in measure(engine, AdvBench(), items).figures


def test_a_real_guard_s_threshold_decides(
    llama3_bytes_chat: ChatFormat, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    torch.manual_seed(0)
    model = make_llama(max_position_embeddings=4096)

    def num_safe(threshold: float) -> int:
        # "safe" and "unsafe" begin with the bytes s and u
        guard = LlamaGuard(model, llama3_bytes_chat, OneRank(), policy="square", batch_tokens=700, threshold=threshold,
                           max_length=2048)  # fmt: skip
        return judge_replies(guard, PROMPTS, REPLIES).safe.successes

    assert (num_safe(1e-9), num_safe(1 - 1e-9)) == (0, 4)
