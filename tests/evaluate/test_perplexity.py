"""Perplexity against closed forms and a plain forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fedsim.base.errors import DataError
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.evaluate.intervals import t_95
from fedsim.evaluate.perplexity import run_perplexity, summarise_scores
from fedsim.generate.engine import Engine, RowScore

TALKS: list[Conversation] = [
    [user_turn("Where is Orla?"), assistant_turn("At the park.")],
    [user_turn("And Pim?"), assistant_turn("Never at home."), user_turn("Sure?"), assistant_turn("Yes.")],
    [{"role": "system", "content": "Be brief."}, user_turn("A kite?"), assistant_turn("It is red and it flies.")],
]


def test_it_is_over_tokens_and_not_over_conversations() -> None:
    """2 tokens at probability 1/2 and 6 at 1/8: exp of (2 ln 2 + 6 ln 8) / 8 = 2^(20/8)."""
    found = summarise_scores([RowScore(-2 * math.log(2), 2), RowScore(-6 * math.log(8), 6)], 1)
    assert found.value == pytest.approx(2**2.5, rel=1e-14)
    assert (found.num_tokens, found.num_conversations, found.num_truncated) == (8, 2, 1)


def test_the_interval_by_hand() -> None:
    """Ratio estimator: nll 4, 2, 3 over 2, 2, 4 tokens: R = 9/8, residuals 7/4, −1/4, −3/2, Σe² = 43/8."""
    found = summarise_scores([RowScore(-4.0, 2), RowScore(-2.0, 2), RowScore(-3.0, 4)], 0)
    half = t_95(2) * math.sqrt(3 / 2 * 43 / 8) / 8
    assert found.high == pytest.approx(math.exp(9 / 8 + half), rel=1e-12)
    assert found.low == 1.0, "no perplexity is below 1"
    many = summarise_scores([RowScore(-4.0, 2), RowScore(-2.0, 2), RowScore(-3.0, 4)] * 30, 0)
    half = t_95(89) * math.sqrt(90 / 89 * 30 * 43 / 8) / 240
    assert many.low == pytest.approx(math.exp(9 / 8 - half), rel=1e-12)


def test_equal_lengths_give_student_s_interval_of_the_mean() -> None:
    nll = [3.0, 5.0, 4.0, 8.0]
    found = summarise_scores([RowScore(-x, 2) for x in nll], 0)
    half = t_95(3) * float(np.std(nll, ddof=1)) / math.sqrt(4) / 2
    assert math.log(found.high / found.value) == pytest.approx(half, rel=1e-12)
    alike = summarise_scores([RowScore(-3.0, 2)] * 5, 0)
    assert alike.low == alike.value == alike.high


def test_one_conversation_has_no_interval() -> None:
    found = summarise_scores([RowScore(-1.0, 3)], 0)
    assert found.low == found.high == found.value
    assert set(found.figures()) == {f"perplexity{ending}" for ending in ("", "_count", "_target_tokens", "_truncated")}


@given(st.permutations(range(6)))
def test_the_order_of_conversations_changes_no_bit(order: list[int]) -> None:
    scores = [RowScore(-((0.1 + i) ** 3), i + 1) for i in range(6)]
    assert summarise_scores([scores[i] for i in order], 0) == summarise_scores(scores, 0)


def test_a_model_that_has_blown_up_is_infinitely_perplexed() -> None:
    assert summarise_scores([RowScore(-1e6, 1), RowScore(-1e5, 1)], 0).value == math.inf


def test_the_last_reply_and_its_end_count(chat: ChatFormat, stub_engine: type) -> None:
    """Every byte of a target costs 1 nat, what stands before it nothing."""
    seen: list[tuple[str, str]] = []

    def logprob(prompt: str, target: str) -> float:
        seen.append((prompt, target))
        return -float(len(target.removesuffix("<|eot_id|>")) + 1)

    found = run_perplexity(stub_engine(chat, logprob=logprob), TALKS)
    assert [target for _, target in seen] == [
        "At the park.<|eot_id|>",
        "Yes.<|eot_id|>",
        "It is red and it flies.<|eot_id|>",
    ]
    assert "Never at home." in seen[1][0] and "Be brief." in seen[2][0]
    assert found.num_tokens == 13 + 5 + 24 and found.num_truncated == 0
    assert found.value == pytest.approx(math.e)


def test_a_long_prompt_loses_its_beginning_and_is_counted(chat: ChatFormat, stub_engine: type) -> None:
    talk = [user_turn("x" * 200), assistant_turn("At the park.")]
    engine = stub_engine(chat, logprob=lambda prompt, target: -1.0, max_context=60)
    found = run_perplexity(engine, [talk])
    assert (found.num_truncated, found.num_tokens) == (1, 13)


def test_a_reply_of_which_no_token_is_left_is_dropped_and_counted(
    make_bytes_chat: Callable[..., ChatFormat], stub_engine: type
) -> None:
    chat = make_bytes_chat()
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    engine = stub_engine(chat, logprob=lambda prompt, target: -1.0)
    lost = [user_turn("Where?"), assistant_turn("~~")]
    found = run_perplexity(engine, [lost, TALKS[0], lost])
    assert (found.num_conversations, found.num_dropped) == (1, 2)
    assert found.figures()["perplexity_dropped"] == 2
    assert "perplexity_dropped" not in run_perplexity(engine, TALKS).figures()
    with pytest.raises(DataError, match=r"eval\.helpful: the tokenizer keeps nothing .* of any of the 2 conversations"):
        run_perplexity(engine, [lost, lost])


def test_a_real_model_as_one_forward_pass_a_conversation(
    llama3_bytes_chat: ChatFormat, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_llama()
    total, count = 0.0, 0
    for talk in TALKS:
        prompt = llama3_bytes_chat.prompt_ids(talk[:-1])
        whole = llama3_bytes_chat.encode(llama3_bytes_chat.render(talk, reply_follows=False))
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(whole[len(prompt) :]), reduction="sum"))
        count += len(whole) - len(prompt)
    engine = Engine(model, llama3_bytes_chat, OneRank(), batch_size=2, max_context=512, seed=0)
    found = run_perplexity(engine, TALKS)
    assert found.num_tokens == count
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.low < found.value < found.high
