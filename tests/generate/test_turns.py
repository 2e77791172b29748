"""Several turns with kept keys and values give what a fresh prefill of every prompt gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.attention.forward import Rows, packed_logits
from fedsim.attention.kv_cache import GROWTH, Extending, Slots, Stepping
from fedsim.attention.spans import Spans
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.generate import decode
from fedsim.generate import engine as engine_module
from fedsim.generate.decode import Decoder, Made, Request, common_prefix
from fedsim.generate.engine import Engine, Sampling

EOS = [259, *range(0, 240, 9)]
CHATS: list[Conversation] = [[user_turn("kite " * (1 + 5 * i % 7) + str(i))] for i in range(11)]
FOLLOW_UPS = [["Why? " + "so " * (i % 4) for i in range(11)], ["<|eot_id|> Now again." for _ in range(11)]]
TURN_KEYS = [("t", "one"), ("t", "two"), ("t", "three")]


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """In fp64: rounding decides no token."""
    return make_llama(eos_token_id=EOS, max_position_embeddings=1024).double()


class Hushed(ChatFormat):
    """Some replies have no text, as if they were special tokens alone."""

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        return "" if len(ids) % 3 == 2 else super().decode(ids)


def engine_of(model: LlamaForCausalLM, chat: ChatFormat, **changes: Any) -> Engine:
    settings = {"batch_size": 4, "max_context": 400, "seed": 5, **changes}
    return Engine(model, Hushed(chat.tokenizer, EOS), OneRank(), **settings)


def one_by_one(engine: Engine, sampling: Sampling) -> list[list[Any]]:
    """Each turn as a call of its own, whose prompts are computed from their first token on."""
    chats, turns = [list(chat) for chat in CHATS], []
    for turn, key in enumerate(TURN_KEYS):
        if turn:
            for chat, reply, text in zip(chats, turns[-1], FOLLOW_UPS[turn - 1], strict=True):
                chat += [assistant_turn(reply.text), user_turn(text)]
        turns.append(engine.generate(chats, sampling, key))
    return turns


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_context", [400, 120])
def test_kept_turns_equal_fresh_ones(
    model: LlamaForCausalLM, llama3_bytes_chat: ChatFormat, temperature: float, max_context: int
) -> None:
    """Rows end at different steps, some replies are empty, and in the short context prompts lose their beginning."""
    sampling = Sampling(temperature, 24)
    kept = engine_of(model, llama3_bytes_chat, max_context=max_context)
    got = kept.converse(CHATS, FOLLOW_UPS, sampling, TURN_KEYS)
    fresh = engine_of(model, llama3_bytes_chat, max_context=max_context)
    assert got == one_by_one(fresh, sampling)
    assert not kept.chat._remembered, "no turn comes again"
    replies = [reply for turn in got for reply in turn]
    assert len({reply.num_tokens for reply in replies}) > 4
    assert any(not reply.text for reply in replies), "an empty reply"
    assert any(reply.prompt_truncated for reply in replies) == (max_context == 120)
    spared = fresh.pop_work().tokens - (work := kept.pop_work()).tokens
    assert spared > (0 if max_context == 120 else work.tokens / 4), "most of the conversation stood in the cache"


def test_slots_that_graphs_read_are_long_enough_from_the_beginning(
    model: LlamaForCausalLM, llama3_bytes_chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CUDA's graphs: all units and turns of a call use one set of them, and of slots."""
    captured: list[Callable[[], None]] = []
    decoders: list[Decoder] = []
    capacities: set[int] = set()

    class Replayed:
        def __init__(self, step: Callable[[], None]) -> None:
            captured.append(step)
            self.replay = step

    class Kept(Decoder):
        def run(self, starts: Sequence[Request], then: Any = lambda row, ids: None) -> list[list[Made]]:
            decoders.append(self)
            capacities.add(self.slots.capacity)
            made = super().run(starts, then)
            capacities.add(self.slots.capacity)
            return made

    want = engine_of(model, llama3_bytes_chat).converse(CHATS, FOLLOW_UPS, Sampling(1.0, 24), TURN_KEYS)
    monkeypatch.setattr(engine_module, "Decoder", Kept)
    monkeypatch.setattr(engine_module, "uses_graphs", lambda device: True)
    monkeypatch.setattr(engine_module, "capture_cuda", Replayed)
    engine = engine_of(model, llama3_bytes_chat)
    assert engine.converse(CHATS, FOLLOW_UPS, Sampling(1.0, 24), TURN_KEYS) == want
    assert len(decoders) == 3 and len(set(map(id, decoders))) == 1
    assert len(capacities) == 1, "no slot moved"
    assert 0 < len(captured) <= 3 * max(capacities) // GROWTH, "of 1, 2 and 4 rows and of each length once"


class Spying(Decoder):
    """Keeps what it is asked and what it makes."""

    seen: list[tuple[Sequence[int], Made]]

    def run(self, starts: Sequence[Request], then: Any = lambda row, ids: None) -> list[list[Made]]:
        asked = [[start] for start in starts]

        def spied(row: int, ids: list[int]) -> Request | None:
            request = then(row, ids)
            if request is not None:
                asked[row].append(request)
            return request

        made = super().run(starts, spied)
        self.seen = [(r.prompt, m) for rs, ms in zip(asked, made, strict=True) for r, m in zip(rs, ms, strict=True)]
        return made


def test_kept_is_the_longest_common_prefix(model: LlamaForCausalLM) -> None:
    """A next prompt that repeats, changes, cuts or drops what the cache holds."""
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13], [14, 15, 16], [20, 21, 22]]

    def then(row: int, ids: list[int]) -> Request | None:
        if row in asked:
            return None
        cached = [*prompts[row], *ids[:-1]]
        asked[row] = [[*cached, 3, 4], cached[:-1], [*cached[2:], 1], [cached[0], 99, *cached[1:]], list(cached)][row]
        return Request(asked[row], 7, 4, 0.0)

    asked: dict[int, list[int]] = {}
    decoder = Spying(model, 2, max_new_tokens=6, eos_ids=frozenset())
    made = decoder.run([Request(p, 1, 6, 0.0) for p in prompts], then)
    assert [turns[1].num_kept for turns in made] == [4 + 5, 3 + 5 - 1 - 1, 0, 1, 3 + 5 - 1]
    for prompt, turn in decoder.seen:
        alone = Decoder(model, 1, max_new_tokens=6, eos_ids=frozenset())
        (((fresh),),) = alone.run([Request(prompt, 1, len(turn.ids), 0.0)])
        assert fresh.ids == turn.ids and turn.num_prompt == len(prompt)


def test_common_prefix_leaves_a_token_to_compute() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 3
    assert common_prefix([1, 2, 3], [1, 5, 3, 4]) == 1
    assert common_prefix([], [1]) == common_prefix([1], [1]) == common_prefix([2], [1, 2]) == 0


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_rows_in_few_slots_equal_rows_alone(model: LlamaForCausalLM, num_slots: int, block: int) -> None:
    """Whatever shares the slots, however often one looks: a row's turns are its own."""

    def conversation(row: int) -> Callable[[int, list[int]], Request | None]:
        turns = iter([Request([row + 3, 8, 9], row + 100, 1 + row, 1.0), None][row % 3 == 0 :])
        return lambda _, ids: next(turns, None)

    starts = [Request([11 + row] * (1 + 3 * row % 7), row, 2 + 5 * row % 11, 1.0) for row in range(9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_ids": frozenset(EOS)}
    thens = [conversation(row) for row in range(9)]
    made = Decoder(model, num_slots, block=block, **options).run(starts, lambda row, ids: thens[row](row, ids))
    alone = [Decoder(model, 1, **options).run([starts[row]], conversation(row))[0] for row in range(9)]
    assert made == alone
    assert len({len(turn.ids) for turns in made for turn in turns}) > 4


@pytest.mark.parametrize("length", range(119, 130))
def test_a_block_of_steps_may_cross_the_end_of_the_slots(model: LlamaForCausalLM, length: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_ids": frozenset()}
    starts = [Request([9] * length, 0, 10, 0.0)]
    assert Decoder(model, 1, block=8, **options).run(starts) == Decoder(model, 1, **options).run(starts)


def test_long_prompts_are_read_in_several_passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [Request(list(range(10, 10 + n)), n, 3, 0.0) for n in (30, 20, 9, 8, 7)]
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_ids": frozenset()}
    whole = Decoder(model, 5, **options)
    want = whole.run(starts)
    assert whole.passes == 3
    sizes: list[int] = []
    real = decode.packed_logits
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(decode, "packed_logits", lambda m, ids, *rest: sizes.append(len(ids)) or real(m, ids, *rest))
    assert Decoder(model, 5, **options).run(starts) == want
    assert [size for size in sizes if size > 5] == [30, 20, 24], "a prompt longer than the budget goes alone"


def test_logits_after_kept_positions_equal_a_fresh_pass(model: LlamaForCausalLM) -> None:
    """Slots are extended, stepped, cut back, exchanged and outgrown; then the logits are those of the whole rows."""
    device = torch.device("cpu")
    slots = Slots(3, device, 2)
    rows = [list(range(3, 53)), list(range(60, 72)), list(range(90, 215))]

    def extend(which: list[int], begin: list[int], end: list[int]) -> torch.Tensor:
        slots.reserve(max(end))
        for slot, start in zip(which, begin, strict=True):
            slots.lengths[slot] = start
        layout = Extending(slots, which, [e - b for b, e in zip(begin, end, strict=True)])
        ids = torch.tensor([i for s, b, e in zip(which, begin, end, strict=True) for i in rows[s][b:e]])
        logits = packed_logits(model, ids, layout.spans.positions, layout, layout.spans.query_starts[1:].long() - 1)
        for slot, stop in zip(which, end, strict=True):
            slots.lengths[slot] = stop
        return logits

    with torch.inference_mode():
        extend([0, 2], [0, 0], [40, 20])
        extend([1, 2], [0, 15], [10, 120])
        slots.move([2, 1, 0], torch.tensor([0, 2]), torch.tensor([2, 0]), 120)
        rows[0], rows[2] = rows[2], rows[0]
        before = slots.capacity
        last = extend([0, 1, 2], [118, 5, 30], [124, 11, 49])
        slots.reserve(before + 1)
        assert slots.capacity == 2 * before
        places = torch.tensor(slots.lengths[:2])
        layout = Stepping(slots, torch.arange(2), places, max(slots.lengths) + 1)
        tokens = torch.tensor([rows[0][124], rows[1][11]])
        stepped = packed_logits(model, tokens, places[None], layout, torch.arange(2))
        for slot, (got, length) in enumerate([(last[0], 124), (last[1], 11), (last[2], 49)]):
            torch.testing.assert_close(got, fresh(model, rows[slot][:length]), atol=1e-10, rtol=0)
        torch.testing.assert_close(stepped[0], fresh(model, rows[0]), atol=1e-10, rtol=0)
        torch.testing.assert_close(stepped[1], fresh(model, rows[1]), atol=1e-10, rtol=0)


def fresh(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    spans = Spans([len(ids)], device=torch.device("cpu"))
    last = torch.tensor([len(ids) - 1])
    return packed_logits(model, torch.tensor(ids), spans.positions, Rows(spans), last)[0]
