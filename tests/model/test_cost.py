"""FLOPs and bytes: against PyTorch's own counter on a real forward and backward pass, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.ranks import OneRank
from fedsim.config.lora import LoraSettings
from fedsim.data.batch import collate
from fedsim.data.chat import ChatFormat, TokenRow
from fedsim.generate.engine import Engine, Sampling
from fedsim.model.cost import Effort, ModelCost, Work, decode_work, rows_work
from fedsim.model.load import attach_lora
from fedsim.model.logprobs import target_logprobs

LAYERS = 6
MakeLlama = Callable[..., Any]


@pytest.fixture(scope="module")
def llama(make_llama: MakeLlama) -> Any:
    """Six layers of width 32 with LoRA on q and v, eager attention (whose products the counter sees)."""
    base = make_llama(num_hidden_layers=LAYERS, attn_implementation=IMPLEMENTATIONS["eager"])
    base.requires_grad_(False)
    return attach_lora(base, LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj"))).get_base_model()


def row(length: int, first_target: int) -> TokenRow:
    return TokenRow(3 + np.arange(length) % 200, np.arange(length) >= first_target)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_sizes_are_those_of_the_model(llama: Any) -> None:
    cost = ModelCost.of(llama)
    assert cost.body == LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert cost.lora == LAYERS * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)
    assert cost.head == 261 * 32
    assert cost.attention == LAYERS * 4 * 8
    assert cost.weight_bytes == 4 * (cost.body + cost.lora + cost.head)
    assert cost.cache_bytes == 4 * 2 * LAYERS * 2 * 8


def test_a_forward_pass_is_what_torch_counts(llama: Any) -> None:
    """Exactly; rotary embeddings are the only other product (one outer product of positions and frequencies)."""
    rows = [row(41, 20), row(41, 20)]
    with torch.no_grad():
        flops = counted(lambda: target_logprobs(llama, collate(rows, torch.device("cpu"))))
    rotary = 2 * 40 * 4 * 2
    assert flops - ModelCost.of(llama).forward(rows_work(rows, 1)).flops in (0, rotary, rotary // 2)


def test_a_training_pass_is_what_torch_counts(llama: Any) -> None:
    """Within a few per cent, and the difference is known: the first layer passes no gradient to the embeddings."""
    cost, rows = ModelCost.of(llama), [row(41, 20), row(41, 20)]
    flops = counted(lambda: target_logprobs(llama, collate(rows, torch.device("cpu"))).sum().backward())
    wanted = cost.train(rows_work(rows, 1)).flops
    assert flops == pytest.approx(wanted, rel=0.04)
    tokens = 2 * 40
    projections = 2 * (32 * 32 + 2 * 32 * 16) * tokens  # q, k, v of the first layer: no gradient of their input
    lora_in = 2 * 2 * (32 * 4) * tokens  # nor of LoRA's A
    keys = 2 * 32 * 2 * 40 * 40  # nor of the keys, which have no LoRA
    assert abs(wanted - projections - lora_in - keys - flops) <= 2 * 40 * 4 * 2


def test_generation_is_what_torch_counts(llama: Any) -> None:
    """A prompt of 20 tokens and 8 new ones: one prefill, seven steps of one token on the cache."""
    ids = torch.arange(20)[None] + 3

    def decode() -> None:
        cache = DynamicCache(config=llama.config)
        llama(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for token in range(7):
            llama(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        flops = counted(decode)
    work = decode_work([(0, 20, 8)], passes=8)
    assert work == Work(tokens=27, targets=8, pairs=400 + sum(range(21, 28)), passes=8, cached=sum(range(21, 28)))
    assert flops == pytest.approx(ModelCost.of(llama).forward(work).flops, rel=0.002)


def test_lora_training_is_4n_a_token_at_scale() -> None:
    """Llama-3.1-8B's SFT step of the performance notes: 16 x 110 tokens, half of them targets, r 32 on q and v."""
    body = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    cost = ModelCost(body, 13_631_488, 128_256 * 4096, 32 * 4096, 0, 0)
    step = cost.train(Work(tokens=16 * 110, targets=16 * 55, pairs=16 * 110**2, passes=1))
    assert step.flops == pytest.approx(51.5e12, rel=0.01)
    assert step.flops == pytest.approx(4 * body * 1760 + 4 * cost.head * 880, rel=0.01)
    assert cost.forward(Work(tokens=7)).flops == 2 * (body + cost.lora) * 7


def test_bytes_are_weights_by_pass_and_the_cache() -> None:
    cost = ModelCost(100, 10, 50, 8, weight_bytes=640, cache_bytes=16)
    assert cost.forward(Work(passes=3, cached=5)) == Effort(0, 3 * 640 + 5 * 16, 0)
    assert cost.train(Work(tokens=2, passes=3)) == Effort(2 * (400 + 60), 2 * 3 * 640, 2)
    assert Effort(1, 2, 3) + Effort(10, 20, 30) == Effort(11, 22, 33)


def test_rows_count_what_is_put_through_the_layers() -> None:
    assert rows_work([row(5, 3), row(9, 1)], 2) == Work(4 + 8, 2 + 8, 16 + 64, 2)
    assert decode_work([(0, 3, 1), (0, 4, 3)], 4) == Work(3 + 4 + 2, 4, 9 + 16 + 5 + 6, 4, 5 + 6)
    assert decode_work([(5, 7, 2)], 2) == Work(2 + 1, 2, 2 * 7 + 8, 2, 5 + 8), "5 of 7 were in the cache"


def test_the_engine_knows_what_it_has_done(make_llama: MakeLlama, llama3_bytes_chat: ChatFormat) -> None:
    engine = Engine(make_llama(), llama3_bytes_chat, OneRank(), batch_size=2, max_context=256, seed=0)
    texts = ["a", "two words", "three"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    replies = engine.generate(chats, Sampling(1.0, 5), ("work",))
    turns = [(0, len(llama3_bytes_chat.prompt_ids(c)), r.num_tokens) for c, r in zip(chats, replies, strict=True)]
    assert [r.num_tokens for r in replies] == [5] * 3
    assert engine.pop_work() == decode_work(turns, passes=2 * 5)
    rows = [row(9, 4), row(12, 3), row(7, 2)]
    engine.score(rows, "rows")
    engine.score(rows, "rows")
    assert engine.pop_work() == rows_work(rows, 2) + rows_work(rows, 2)
    assert engine.pop_work() == Work()
