"""Replayed steps: the same tokens as eager ones, from tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.generate.decode import Decoder, Made, Request
from fedsim.generate.graph import NUM_CHECKED, Graphs, can_be_captured

EOS = frozenset({259, *range(0, 240, 12)})


def starts(temperature: float) -> list[Request]:
    return [Request([11 + row] * (1 + 17 * row % 70), row, 4 + 23 * row % 61, temperature) for row in range(13)]


class Remembered:
    """Stands in for a CUDA graph: capturing does nothing, replaying repeats the call with the tensors it saw."""

    def __init__(self, step: Callable[[], object], decoder: Decoder) -> None:
        self.step = step
        self.decoder = decoder
        self.addresses = addresses(decoder)
        self.num_replays = 0

    def replay(self) -> None:
        assert addresses(self.decoder) == self.addresses, "a graph would read memory that is another's by now"
        self.num_replays += 1
        self.step()


def addresses(decoder: Decoder) -> list[int]:
    state = decoder.state
    tensors = [state.rows, state.ids, state.places, state.counts, state.limits, state.alive, state.lines]
    tensors += [state._out, state._uniforms, *decoder.slots._parts]
    return [tensor.data_ptr() for tensor in tensors]


def replayed(model: LlamaForCausalLM, num_slots: int, **options: Any) -> tuple[Decoder, list[Remembered]]:
    graphs: list[Remembered] = []

    def capture(step: Callable[[], object]) -> Remembered:
        graphs.append(Remembered(step, decoder))
        return graphs[-1]

    decoder = Decoder(model, num_slots, max_new_tokens=64, eos_ids=EOS, graphs=Graphs(capture), **options)
    return decoder, graphs


def run(decoder: Decoder, temperature: float) -> list[list[Made]]:
    """All rows, every other one with a second turn."""
    rows = starts(temperature)
    asked: set[int] = set()

    def then(row: int, ids: list[int]) -> Request | None:
        if row % 2 or row in asked:
            return None
        asked.add(row)
        return Request([*rows[row].prompt, *ids, 5, 6], 50 + row, 9, temperature)

    return decoder.run(rows, then)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_slots", "block"), [(5, 1), (5, 4), (8, 3), (16, 8)])
def test_replays_give_the_eager_tokens(
    make_llama: Callable[..., LlamaForCausalLM], temperature: float, num_slots: int, block: int
) -> None:
    model = make_llama().double()
    want = run(Decoder(model, num_slots, max_new_tokens=64, eos_ids=EOS), temperature)
    decoder, graphs = replayed(model, num_slots, block=block)
    assert run(decoder, temperature) == want
    assert graphs and max(graph.num_replays for graph in graphs) > 5
    assert len(graphs) <= 2 * num_slots.bit_length(), "one a number of rows and a capacity"
    assert decoder.graphs is not None
    assert run(decoder, temperature) == want, "another unit, the same slots"
    num_graphs = len(graphs)
    assert run(decoder, temperature) == want
    assert len(graphs) == num_graphs, "no slot has moved since, so every graph is still of use"


def test_what_a_step_computes_depends_on_its_own_unit_alone(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another unit before, with longer rows, has left longer slots: steps see as many of their positions as ever."""
    sizes: list[tuple[int, int]] = []
    take = Graphs.run
    monkeypatch.setattr(Graphs, "run", lambda self, size, *rest: sizes.append(size) or take(self, size, *rest))
    model = make_llama(max_position_embeddings=1024)

    def seen(decoder: Decoder, length: int) -> list[tuple[int, int]]:
        sizes.clear()
        decoder.run([Request([11 + row] * length, row, 60, 0.0) for row in range(3)])
        return list(sizes)

    fresh = seen(replayed(model, 4, block=4)[0], 100)
    decoder, _ = replayed(model, 4, block=4)
    seen(decoder, 400)
    assert decoder.slots.capacity > 400
    assert seen(decoder, 100) == fresh
    assert {longest for _, longest, _ in fresh} == {128, 256}, "as few positions as the unit needs"


@pytest.mark.parametrize(
    ("kind", "wanted"), [("default", True), ("llama3", True), ("dynamic", False), ("longrope", False)]
)
def test_steps_that_ask_the_device_are_not_captured(
    make_llama: Callable[..., LlamaForCausalLM], kind: str, wanted: bool
) -> None:
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        half = make_llama().config.head_dim // 2
        scaling |= {"short_factor": [1.0] * half, "long_factor": [2.0] * half, "original_max_position_embeddings": 64}
    assert can_be_captured(make_llama(rope_parameters=scaling)) == wanted


# ---- the first graph is compared with the steps that it replaces ------------------------------------------------


class Counter:
    """A step that adds 1 to what it carries, and whose logits are twice what it carried.

    Args:
        fault: what is wrong with its graphs; "" for nothing.
    """

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.carried = torch.zeros(2)
        self.log: list[str] = []
        self.is_replaying = False

    def step(self) -> torch.Tensor:
        fault = self.fault if self.is_replaying else ""
        self.log.append("replayed" if self.is_replaying else "plain")
        if fault == "second" and self.log.count("replayed") == 2:
            self.carried += 1
        logits = self.carried[None] * 2
        self.carried += 1
        if fault == "state":
            self.carried[0] += 1
        if fault == "sign":
            logits = torch.where(logits == 0, -0.0, logits)
        return logits + 1 if fault == "logits" else logits

    def capture(self, step: Callable[[], object]) -> Any:
        if self.fault == "capture":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.log.append("captured")
        work = self

        class Replay:
            def replay(self) -> None:
                if work.fault == "replay":
                    raise RuntimeError("an illegal memory access")
                work.is_replaying = True
                step()
                work.is_replaying = False

        return Replay()

    def run(self, graphs: Graphs, *sizes: int) -> list[str]:
        self.log.clear()
        for size in sizes:
            graphs.run(size, self.step, [self.carried])
        return list(self.log)


COMPARED = ["replayed"] * NUM_CHECKED + ["plain"] * NUM_CHECKED


def test_the_first_step_of_a_size_is_not_captured() -> None:
    """A size's first graph is compared: two replays, then two plain steps; then all steps have been taken once."""
    work = Counter()
    graphs = Graphs(work.capture)
    assert work.run(graphs, 4, 4, 4) == ["plain", "captured", *COMPARED, "replayed", "replayed"]
    assert work.run(graphs, 8, 4, 8) == ["plain", "replayed", "captured", *COMPARED, "replayed"]
    assert work.carried.tolist() == [6.0, 6.0] and graphs.problem is None
    graphs.clear()
    assert work.run(graphs, 4, 4) == ["plain", "captured", "replayed"], "other slots: other graphs, but as good"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("logits", "a replayed step gives other logits than the plain one (step 1 of 2)"),
        ("sign", "a replayed step gives other logits than the plain one (step 2 of 2)"),
        ("state", "a replayed step gives other state than the plain one (step 1 of 2)"),
        ("second", "a replayed step gives other logits than the plain one (step 2 of 2)"),
        ("capture", "capturing a step ended with RuntimeError: operation not permitted when stream is capturing"),
        ("replay", "capturing a step ended with RuntimeError: an illegal memory access"),
    ],
)
def test_a_graph_that_is_wrong_is_not_used(fault: str, words: str) -> None:
    work = Counter(fault)
    if fault == "sign":  # the second compared step's logits are zero
        work.carried -= 2
    before = work.carried.clone()
    graphs = Graphs(work.capture)
    log = work.run(graphs, 4, 4, 4, 8, 8)
    assert graphs.problem == words
    assert torch.equal(work.carried, before + 5), "every step was taken once, from where the last one ended"
    assert log.count("captured") <= 1 and log[-3:] == ["plain"] * 3


class FullMemory(Counter):
    """Memory is full at some captures or replays of size 8, counted from 0; the others fit."""

    def __init__(self, *full: int, at: str = "capture") -> None:
        super().__init__()
        self.full = full
        self.at = at
        self.size = 0
        self.num_tries = 0

    def capture(self, step: Callable[[], object]) -> Any:
        is_full = self.size == 8 and self.num_tries in self.full
        self.num_tries += self.size == 8
        if is_full and self.at == "capture":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if is_full and self.at == "end":  # the broken capture cannot be ended
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            except torch.OutOfMemoryError:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        graph = super().capture(step)
        if is_full:  # while it is compared
            replay, replays = graph.replay, iter(range(9))

            def fails() -> None:
                replay()
                if next(replays) == 1:
                    raise RuntimeError("CUDA error: out of memory")

            graph.replay = fails
        return graph

    def run(self, graphs: Graphs, *sizes: int) -> list[str]:
        self.log.clear()
        for self.size in sizes:
            graphs.run(self.size, self.step, [self.carried])
        return list(self.log)


@pytest.mark.parametrize("at", ["capture", "end", "replay"])
def test_full_memory_is_freed_and_the_capture_tried_again(at: str) -> None:
    work = FullMemory(0, at=at)
    graphs = Graphs(work.capture, free=lambda: work.log.append("freed"))
    log = work.run(graphs, 8, 8, 8)
    assert log.count("freed") == 1 and log[-len(COMPARED) - 3 :] == ["captured", *COMPARED, "replayed", "replayed"]
    assert work.carried.tolist() == [3.0, 3.0] and graphs.problem is None and graphs.pop_too_large() == []


@pytest.mark.parametrize("at", ["capture", "end", "replay"])
def test_a_size_that_does_not_fit_runs_without_a_graph(at: str) -> None:
    """It is not tried again, also after other slots; graphs of other sizes stay and come."""
    work = FullMemory(0, 1, at=at)
    graphs = Graphs(work.capture, free=lambda: work.log.append("freed"))
    work.run(graphs, 4, 4)
    work.run(graphs, 8, 8)
    assert work.run(graphs, 8, 4, 2, 2, 8) == ["plain", "replayed", "plain", "captured", *COMPARED, "replayed", "plain"]
    assert work.carried.tolist() == [9.0, 9.0] and graphs.problem is None
    assert graphs.pop_too_large() == [8] and graphs.pop_too_large() == []
    graphs.clear()
    assert work.run(graphs, 8, 8, 4, 4) == ["plain", "plain", "plain", "captured", "replayed"]
    assert work.num_tries == 2


def test_graphs_that_are_off_stay_off() -> None:
    work = Counter()
    assert work.run(Graphs(work.capture, problem="elsewhere"), 4, 4, 4) == ["plain"] * 3


@pytest.mark.parametrize("fault", ["logits", "keys", "capture", None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decoder_goes_on_without_a_wrong_graph(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, fault: str | None, temperature: float
) -> None:
    """Tokens are those of plain steps; the sizes of steps are those of graphs, whether or not they are replayed."""
    model = make_llama().double()
    want = run(Decoder(model, 5, max_new_tokens=64, eos_ids=EOS), temperature)
    sizes: list[list[tuple[int, int]]] = []
    step = Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self, *size: sizes[-1].append(size) or step(self, *size))
    sizes.append([])
    decoder, _ = replayed(model, 5, block=4)
    assert run(decoder, temperature) == want

    sizes.append([])
    num_captures = 0

    def capture(step: Callable[[], Any]) -> Any:
        nonlocal num_captures
        num_captures += 1
        if fault == "capture":
            raise RuntimeError("no")

        class Wrong:
            def replay(self) -> None:
                kept = [part.clone() for part in decoder.slots._parts]
                step()
                if fault == "keys":  # the graph wrote its keys and values to where nobody reads them
                    for to, old in zip(decoder.slots._parts, kept, strict=True):
                        to.copy_(old)
                if fault == "logits":
                    decoder.state.ids.add_(1).remainder_(200)

        return Wrong()

    decoder = Decoder(model, 5, max_new_tokens=64, eos_ids=EOS, graphs=Graphs(capture), block=4)
    assert run(decoder, temperature) == want and decoder.graphs is not None
    assert (decoder.graphs.problem is None) == (fault is None)
    assert num_captures == 1 or fault is None, "graphs are off from then on"
    assert set(sizes[0]) == set(sizes[1])


def test_a_step_makes_no_lasting_tensor(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Between two steps of one size nothing is moved, and only the state and the slots carry anything over."""
    decoder = Decoder(make_llama(), 4, max_new_tokens=64, eos_ids=frozenset())
    decoder.run([Request([3, 4, 5], row, 2, 1.0) for row in range(4)])
    before = addresses(decoder)
    with torch.inference_mode():
        for _ in range(3):
            decoder._step(4, decoder.slots.capacity)
    assert addresses(decoder) == before
