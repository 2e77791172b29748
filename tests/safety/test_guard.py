"""Guards: first-token scoring equals a plain forward pass; the noisy oracle keeps its rates, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fedsim.base.errors import ConfigError
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, user_turn
from fedsim.data.guard_prompt import render_guard_prompt
from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import Verdict
from fedsim.safety.guard import LlamaGuard, NoisyOracleGuard, OracleGuard, units_of


class ScatteredRanks(OneRank):
    """Computes the units in another order, as other ranks would, after a round trip of the function's own state."""

    def map(self, compute: Callable[[Any], Any], units: Sequence[Any], *_: object) -> list[Any]:
        done = {i: compute(units[i]) for i in reversed(range(len(units)))}
        return [done[i] for i in range(len(units))]


def guard(model: LlamaForCausalLM, chat: ChatFormat, **changes: Any) -> LlamaGuard:
    settings = {"policy": "square", "batch_tokens": 600, "threshold": 0.5, "max_length": 1024, **changes}
    return LlamaGuard(model, chat, settings.pop("ranks", OneRank()), **settings)


def pair_logits(model: LlamaForCausalLM, chat: ChatFormat, user: str, agent: str | None, policy: str) -> torch.Tensor:
    """Logits of the first tokens of "safe" and "unsafe" by one plain forward pass over the whole prompt."""
    ids = chat.prompt_ids([user_turn(render_guard_prompt(user, agent, policy))]) + chat.encode("\n\n")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits[[chat.encode("safe")[0], chat.encode("unsafe")[0]]]


@pytest.mark.parametrize("policy", ["llama_guard_3", "square"])
@pytest.mark.parametrize("batch_tokens", [1, 600, 100_000])
def test_equals_a_plain_forward(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow], policy: str, batch_tokens: int
) -> None:
    verdicts = guard(guard_model, llama_chat, policy=policy, batch_tokens=batch_tokens).judge(rows)
    pairs = [pair_logits(guard_model, llama_chat, row.prompt, row.response, policy) for row in rows]
    want = [float(torch.softmax(pair.double(), dim=0)[1]) for pair in pairs]
    assert max(want) - min(want) > 0.05, "the oracle must be able to tell rows apart"
    assert [v.unsafe_prob for v in verdicts] == pytest.approx(want, abs=1e-4)
    assert [v.unsafe for v in verdicts] == [bool(pair.argmax()) for pair in pairs], "0.5 equals greedy decoding"
    assert not any(v.cut for v in verdicts)


def test_a_prompt_alone_and_mixed_roles(guard_model: LlamaForCausalLM, llama_chat: ChatFormat) -> None:
    exchanges: list[tuple[str, str | None]] = [("Who flies?", None), ("Who flies?", "Orla flies."), ("Who?", None)]
    verdicts = guard(guard_model, llama_chat).judge_exchanges(exchanges)
    for (user, agent), verdict in zip(exchanges, verdicts, strict=True):
        pair = pair_logits(guard_model, llama_chat, user, agent, "square")
        assert verdict.unsafe_prob == pytest.approx(float(torch.softmax(pair.double(), dim=0)[1]), abs=1e-4)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_units_hold_rows_in_order_of_length_within_the_budget(lengths: list[int], most: int) -> None:
    units = units_of(lengths, most)
    order = [i for unit in units for i in unit]
    assert order == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    assert all(0 < size <= most or len(unit) == 1 for size, unit in zip(sizes, units, strict=True))
    for size, unit in zip(sizes, units[1:], strict=False):
        assert size + lengths[unit[0]] > most, "a unit ends where the next row does not fit"


def test_a_row_hardly_feels_the_others_of_its_unit(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    """In fp64: whatever else is scored with it, a row's probability is the same up to rounding."""
    judge = guard(guard_model.double(), llama_chat, batch_tokens=100_000)
    together = [v.unsafe_prob for v in judge.judge(rows)]
    alone = [judge.judge([row])[0].unsafe_prob for row in rows]
    assert together == pytest.approx(alone, abs=1e-10) and max(together) - min(together) > 0.05


def test_results_do_not_depend_on_who_computes_a_unit(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    here = guard(guard_model, llama_chat).judge(rows)
    there = guard(guard_model, llama_chat, ranks=ScatteredRanks()).judge(rows)
    assert here == there


def test_new_weights_are_seen_by_the_next_call(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    judge = guard(guard_model, llama_chat)
    before = judge.judge(rows)
    with torch.no_grad():
        guard_model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    assert judge.judge(rows) == guard(guard_model, llama_chat).judge(rows) != before


def test_threshold_moves_the_verdict_alone(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    probs = [v.unsafe_prob for v in guard(guard_model, llama_chat).judge(rows)]
    level = sorted(probs)[len(probs) // 2]
    verdicts = guard(guard_model, llama_chat, threshold=level).judge(rows)
    assert [v.unsafe_prob for v in verdicts] == probs
    assert [v.unsafe for v in verdicts] == [p >= level for p in probs]


def test_long_rows_are_cut_and_marked(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, make_row: Callable[..., SquareRow]
) -> None:
    rows = [make_row(0), make_row(1, response="The kite flies. " * 200)]
    verdicts = guard(guard_model, llama_chat, max_length=500).judge(rows)
    assert [v.cut for v in verdicts] == [False, True]


def test_mode_progress_and_no_rows(
    guard_model: LlamaForCausalLM, llama_chat: ChatFormat, rows: list[SquareRow]
) -> None:
    seen: list[tuple[int, int]] = []
    judge = guard(guard_model.train(), llama_chat, on_progress=lambda done, total: seen.append((done, total)))
    judge.judge(rows)
    assert guard_model.training, "the model's mode is put back"
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert judge.judge([]) == []


def test_oracle_is_the_label(rows: list[SquareRow]) -> None:
    assert OracleGuard().judge(rows) == [Verdict(row.red, float(row.red)) for row in rows]


@pytest.mark.parametrize(("tpr", "fpr"), [(0.737, 0.241), (0.05, 0.9)])
def test_noisy_oracle_keeps_its_rates(make_row: Callable[..., SquareRow], tpr: float, fpr: float) -> None:
    rows = [make_row(i, red=i % 2 == 0, response="x") for i in range(8000)]
    verdicts = NoisyOracleGuard(tpr, fpr, seed=5).judge(rows)
    for red, rate in ((True, tpr), (False, fpr)):
        called = [v.unsafe for row, v in zip(rows, verdicts, strict=True) if row.red == red]
        margin = 4 * math.sqrt(rate * (1 - rate) / len(called))
        assert abs(sum(called) / len(called) - rate) < margin


def test_noisy_oracle_draws_belong_to_the_row(make_row: Callable[..., SquareRow]) -> None:
    rows = [make_row(i, red=i % 3 == 0, response="x") for i in range(300)]
    noisy = NoisyOracleGuard(0.7, 0.3, seed=5)
    whole = noisy.judge(rows)
    assert noisy.judge(rows[::-1]) == whole[::-1]
    assert noisy.judge(rows[40:50]) == whole[40:50]
    assert NoisyOracleGuard(0.7, 0.3, seed=6).judge(rows) != whole
    stricter = NoisyOracleGuard(0.9, 0.5, seed=5).judge(rows)
    assert all(b.unsafe for a, b in zip(whole, stricter, strict=True) if a.unsafe), "sweeps are nested"


def test_noisy_oracle_without_errors_is_the_oracle(rows: list[SquareRow]) -> None:
    assert NoisyOracleGuard(1.0, 0.0, seed=1).judge(rows) == OracleGuard().judge(rows)


@pytest.mark.parametrize(("tpr", "fpr", "name"), [(1.2, 0.1, "tpr=1.2"), (0.5, -0.1, "fpr=-0.1")])
def test_rates_outside_0_and_1_are_an_error(tpr: float, fpr: float, name: str) -> None:
    with pytest.raises(ConfigError, match=f"guard.{name}: a chance lies between 0 and 1"):
        NoisyOracleGuard(tpr, fpr, seed=0)
