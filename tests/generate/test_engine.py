"""The engine: fixed units in any order on any rank, keyed draws, and what a reply says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.attention.kv_cache import Slots
from fedsim.base import keyed_random
from fedsim.base.errors import RunError
from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, Conversation, assistant_turn, user_turn
from fedsim.generate import decode
from fedsim.generate import engine as engine_module
from fedsim.generate.decode import Decoder, Made, Request, Then
from fedsim.generate.engine import Engine, RowScore, Sampling
from fedsim.generate.slot_state import State

CHATS: list[Conversation] = [[user_turn("kite " * (1 + 5 * i % 7) + str(i))] for i in range(11)]
KEY = ("advbench", 3)


class ScatteredRanks(OneRank):
    """Computes units last first, as other ranks would."""

    def map(self, compute: Callable[[Any], Any], units: Sequence[Any], *_: object) -> list[Any]:
        done = {i: compute(units[i]) for i in reversed(range(len(units)))}
        return [done[i] for i in range(len(units))]


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_llama(eos_token_id=list(range(15)))


@pytest.fixture()
def make_engine(model: LlamaForCausalLM, llama3_bytes_chat: ChatFormat) -> Callable[..., Engine]:
    ending = ChatFormat(llama3_bytes_chat.tokenizer, range(15))

    def make(**changes: Any) -> Engine:
        settings = {"batch_size": 4, "max_context": 256, "seed": 5, **changes}
        return Engine(model, ending, settings.pop("ranks", OneRank()), **settings)

    return make


def test_replies_equal_the_decoder(make_engine: Callable[..., Engine], model: LlamaForCausalLM) -> None:
    engine = make_engine()
    replies = engine.generate(CHATS, Sampling(0.9, 20), KEY)
    eos = frozenset({*range(15), 259})
    for i, (chat, reply) in enumerate(zip(CHATS, replies, strict=True)):
        decoder = Decoder(model, 1, max_new_tokens=20, eos_ids=eos)
        request = Request(engine.chat.prompt_ids(chat), keyed_random.derive(5, "sample", *KEY, i), 20, 0.9)
        (((ids, ended),),) = [[(made.ids, made.ended) for made in row] for row in decoder.run([request])]
        assert (reply.text, reply.num_tokens, reply.truncated) == (engine.chat.decode(ids), len(ids), not ended)
        assert not reply.prompt_truncated
    assert len({r.truncated for r in replies}) == 2, "some end, some are cut"


def test_who_computes_a_unit_does_not_matter(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, and every logit of the model in fp32: slots that other units have used are as good as new ones."""
    seen: dict[bytes, list[torch.Tensor]] = {}
    logits: list[torch.Tensor] = []
    real = decode.pick
    monkeypatch.setattr(decode, "pick", lambda found, *how: logits.append(found) or real(found, *how))

    class Kept(Decoder):
        def run(self, starts: Sequence[Request], then: Then = lambda row, ids: None) -> list[list[Made]]:
            logits.clear()
            made = super().run(starts, then)
            seen.setdefault(repr(starts).encode(), []).append(torch.cat(logits))
            return made

    class Fresh(Kept):
        def run(self, starts: Sequence[Request], then: Then = lambda row, ids: None) -> list[list[Made]]:
            self.slots, self.state = Slots(4, self.slots.device), State(4, 70, self.slots.device)
            return super().run(starts, then)

    found = []
    for kind, ranks in [(Kept, OneRank()), (Kept, ScatteredRanks()), (Fresh, OneRank())]:
        monkeypatch.setattr(engine_module, "Decoder", kind)
        found.append(make_engine(ranks=ranks, max_context=400).generate(CHATS, Sampling(1.0, 70), KEY))
    assert found[0] == found[1] == found[2]
    assert len(seen) == 3 and all(len(those) == 3 for those in seen.values())
    assert all(torch.equal(those[0], other) for those in seen.values() for other in those[1:])


def test_key_and_seed_name_the_draws(make_engine: Callable[..., Engine]) -> None:
    base = make_engine().generate(CHATS, Sampling(1.0, 8), KEY)
    assert make_engine().generate(CHATS, Sampling(1.0, 8), KEY) == base
    assert make_engine().generate(CHATS, Sampling(1.0, 8), ("advbench", 4)) != base
    assert make_engine(seed=6).generate(CHATS, Sampling(1.0, 8), KEY) != base
    same = make_engine().generate([CHATS[0]] * 2, Sampling(1.0, 8), KEY)
    assert same[0] != same[1], "rows with one prompt have draws of their own"


@pytest.mark.parametrize("max_new_tokens", [10, 32, 500])
def test_prompt_and_reply_never_outgrow_the_context(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    """A long prompt loses its beginning, and is marked; the reply has at most half of the context."""
    longest = []

    class Spy(Decoder):
        def run(self, starts: Sequence[Request], then: Then = lambda row, ids: None) -> list[list[Made]]:
            longest.extend(len(start.prompt) + start.limit for start in starts)
            self._eos, self._eos_ids = self._eos[:0], frozenset()
            return super().run(starts, then)

    monkeypatch.setattr(engine_module, "Decoder", Spy)
    engine = make_engine(max_context=64)
    chats: list[Conversation] = [[user_turn("abc" * n)] for n in (1, 100)]
    replies = engine.generate(chats, Sampling(0.0, max_new_tokens), KEY)
    assert max(longest) <= 64
    assert [r.prompt_truncated for r in replies] == [
        len(engine.chat.prompt_ids(chats[0])) > 64 - min(max_new_tokens, 32),
        True,
    ]
    assert [r.num_tokens for r in replies] == [min(max_new_tokens, 32)] * 2
    assert all(r.truncated for r in replies)


def test_an_overlong_prompt_keeps_its_end(make_engine: Callable[..., Engine]) -> None:
    """Where the question is, and where the reply begins: prompts that end alike are answered alike."""
    endings = ("Orla flies?", "Orla flies?", "Pim does not?")
    chats: list[Conversation] = [
        [user_turn(300 * beginning + 200 * "." + ending)] for beginning, ending in zip("xyx", endings, strict=True)
    ]
    replies = make_engine(max_context=128).generate(chats, Sampling(0.0, 12), KEY)
    assert all(reply.prompt_truncated for reply in replies)
    assert replies[0] == replies[1] != replies[2]


def test_scores_are_in_order(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    rows = [engine.chat.training_row([*c, assistant_turn("red " * (i % 3 + 1))], 200) for i, c in enumerate(CHATS)]
    scores = engine.score(rows, "rows")
    alone = [engine.score([row], "rows")[0] for row in rows]
    assert [s.num_targets for s in scores] == [row.num_targets for row in rows]
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in alone], rel=1e-5)
    assert make_engine(ranks=ScatteredRanks()).score(rows, "rows") == scores
    assert scores[0].mean == scores[0].logprob / scores[0].num_targets
    assert RowScore(0.0, 0).mean == float("-inf")


def test_mode_progress_and_nothing_to_do(make_engine: Callable[..., Engine], model: LlamaForCausalLM) -> None:
    seen: list[tuple[int, int]] = []
    engine = make_engine(on_progress=lambda done, total: seen.append((done, total)))
    model.train()
    try:
        engine.generate(CHATS, Sampling(0.0, 2), KEY)
        assert model.training, "the mode is put back"
    finally:
        model.eval()
    assert seen == [(row, len(CHATS)) for row in range(1, len(CHATS) + 1)]
    assert engine.generate([], Sampling(0.0, 2), KEY) == [] and engine.score([], "rows") == []


def test_the_adapter_of_the_moment_is_used(make_adapted: Callable[..., Any]) -> None:
    loaded, flat = make_adapted(std=0.0)
    engine = Engine(loaded.base, loaded.chat, OneRank(), batch_size=4, max_context=256, seed=0)
    before = engine.generate(CHATS[:3], Sampling(0.0, 6), KEY)
    start = flat.copy()
    flat.load(torch.randn(flat.size, generator=torch.Generator().manual_seed(0)))
    assert engine.generate(CHATS[:3], Sampling(0.0, 6), KEY) != before
    flat.load(start)
    assert engine.generate(CHATS[:3], Sampling(0.0, 6), KEY) == before


def test_logits_that_are_no_numbers_end_the_run_by_name(
    make_llama: Callable[..., LlamaForCausalLM], llama3_bytes_chat: ChatFormat
) -> None:
    """An embedding that overflows: the row and its stage are named, and no token is made up."""
    model = make_llama()
    chats: list[Conversation] = [[user_turn("kite")], [user_turn("a zebra")]]
    with torch.no_grad():
        model.get_input_embeddings().weight[llama3_bytes_chat.encode("z")] = torch.inf
    engine = Engine(model, llama3_bytes_chat, OneRank(), batch_size=4, max_context=256, seed=5)
    assert engine.generate(chats[:1], Sampling(1.0, 2), KEY)
    with pytest.raises(RunError, match=r"advbench/3, row 1: the model's logits became NaN or infinite"):
        engine.generate(chats, Sampling(1.0, 2), KEY)


@pytest.fixture()
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs stand in on the CPU, and refuse slots that have moved; the list grows by one with each capture."""
    found: list[int] = []
    decoders: list[Decoder] = []

    class Listed(Decoder):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            decoders.append(self)

    def addresses() -> list[int]:
        return [part.data_ptr() for part in decoders[-1].slots._parts]

    def capture(step: Callable[[], object]) -> Any:
        found.append(len(found))
        then = addresses()

        def replay() -> None:
            assert addresses() == then, "a graph would read memory that is another's by now"
            step()

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(engine_module, "Decoder", Listed)
    monkeypatch.setattr(engine_module, "uses_graphs", lambda device: True)
    monkeypatch.setattr(engine_module, "capture_cuda", capture)
    return found


def test_graphs_are_kept_between_calls_where_slots_fit_into_spare_memory(
    make_engine: Callable[..., Engine], captured: list[int]
) -> None:
    """Replies are those of new slots: a kept decoder serves calls with as many slots and tokens no longer than its."""
    wanted = [make_engine().generate(CHATS, Sampling(t, 20), KEY) for t in (1.0, 0.0)]
    num_captured = len(captured)
    engine = make_engine()
    engine.spare_bytes = 1 << 40
    captured.clear()
    assert [engine.generate(CHATS, Sampling(t, 20), KEY) for t in (1.0, 0.0)] == wanted
    assert len(captured) == num_captured > 0, "other draws, other graphs"
    assert [engine.generate(CHATS, Sampling(t, 20), KEY) for t in (1.0, 0.0)] == wanted
    assert engine.generate(CHATS, Sampling(1.0, 10), KEY) and len(captured) == num_captured
    slots = engine._kept and engine._kept.slots
    engine.generate(CHATS[:2], Sampling(1.0, 20), KEY)
    assert engine._kept is not None and engine._kept.slots is not slots, "two slots"
    engine.spare_bytes = 0
    assert engine.generate(CHATS, Sampling(1.0, 20), KEY) == wanted[0]
    assert engine._kept is None, "slots are given back where something else needs their memory"


def test_kept_graphs_serve_the_adapters_that_they_were_captured_with(
    make_engine: Callable[..., Engine], captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.spare_bytes = 1 << 40
    engine.generate(CHATS, Sampling(1.0, 20), KEY)
    kept = engine._kept
    engine.generate(CHATS, Sampling(1.0, 20), KEY)
    assert kept is not None and engine._kept is kept
    monkeypatch.setattr(engine_module, "adapters_in_use", lambda model: "none")
    engine.generate(CHATS, Sampling(1.0, 20), KEY)
    assert engine._kept is not None and engine._kept is not kept


def test_longer_rows_in_kept_slots_get_graphs_of_their_own(
    make_engine: Callable[..., Engine], captured: list[int]
) -> None:
    engine = make_engine(max_context=600)
    engine.spare_bytes = 1 << 40
    long: list[Conversation] = [[user_turn("kite " * 60 + str(i))] for i in range(11)]
    wanted = make_engine(max_context=600).generate(long, Sampling(1.0, 20), KEY)
    short = engine.generate(CHATS, Sampling(1.0, 20), KEY)
    num_captured, capacity = len(captured), engine._kept.slots.capacity if engine._kept else 0
    assert engine.generate(long, Sampling(1.0, 20), KEY) == wanted
    assert engine._kept is not None and engine._kept.slots.capacity > capacity and len(captured) > num_captured
    assert engine.generate(CHATS, Sampling(1.0, 20), KEY) == short, "by graphs of the slots that there are now"


def test_a_size_without_memory_is_said_once(
    make_engine: Callable[..., Engine], captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps run as they are, and graphs of other sizes go on."""
    wanted = make_engine().generate(CHATS, Sampling(1.0, 20), KEY)
    real, tries = engine_module.capture_cuda, 0

    def full(step: Callable[[], object]) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(step)

    monkeypatch.setattr(engine_module, "capture_cuda", full)
    monkeypatch.setattr(engine_module, "free_cuda", lambda: None)
    notes: list[str] = []
    engine = make_engine()
    engine.on_note = notes.append
    captured.clear()
    assert engine.generate(CHATS, Sampling(1.0, 20), KEY) == wanted and captured
    tries = 0
    assert engine.generate(CHATS, Sampling(1.0, 20), KEY) == wanted
    assert engine.graph_problem is None
    (note,) = notes
    assert note.startswith("decoding steps of 4 rows and ") and "without a CUDA graph: memory is full" in note


def test_adapters_are_held_while_rows_are_computed(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation and scoring both; the adapter may change between calls."""
    held: list[str] = []

    @contextmanager
    def hold(model: Any) -> Iterator[None]:
        held.append("held")
        yield
        held.append("released")

    monkeypatch.setattr(engine_module, "hold_adapters", hold)
    engine = make_engine()
    engine.generate(CHATS[:1], Sampling(1.0, 2), KEY)
    engine.score([engine.chat.training_row([*CHATS[0], assistant_turn("red")], 200)], "rows")
    assert held == ["held", "released"] * 2
