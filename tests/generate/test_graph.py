"""Replayed steps: the same tokens as eager ones, from tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.generate.decode import Decoder, Made, Request
from fedsim.generate.graph import Graphs, can_be_captured, graph_path

EOS = frozenset({259, *range(0, 240, 12)})


def starts(temperature: float) -> list[Request]:
    return [Request([11 + row] * (1 + 17 * row % 70), row, 4 + 23 * row % 61, temperature) for row in range(13)]


class Remembered:
    """Stands in for a CUDA graph: capturing does nothing, replaying repeats the call with the tensors it saw."""

    def __init__(self, step: Callable[[], None], decoder: Decoder) -> None:
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

    def capture(step: Callable[[], None]) -> Remembered:
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
    step = Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self, *size: sizes.append(size) or step(self, *size))
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
    assert {longest for _, longest in fresh} == {128, 256}, "as few positions as the unit needs"


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


def test_the_first_step_of_a_size_is_not_captured() -> None:
    log: list[str] = []

    class Logged:
        def __init__(self, step: Callable[[], None]) -> None:
            log.append("captured")

        def replay(self) -> None:
            log.append("replayed")

    graphs = Graphs(Logged)
    for size in (4, 4, 4, 8, 4):
        graphs.run(size, lambda: log.append("eager"))
    assert log == ["eager", "captured", "replayed", "replayed", "eager", "replayed"]
    graphs.clear()
    graphs.run(4, lambda: log.append("eager"))
    assert log[-1] == "eager"


def test_a_step_makes_no_lasting_tensor(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Between two steps of one size nothing is moved, and only the state and the slots carry anything over."""
    decoder = Decoder(make_llama(), 4, max_new_tokens=64, eos_ids=frozenset())
    decoder.run([Request([3, 4, 5], row, 2, 1.0) for row in range(4)])
    before = addresses(decoder)
    with torch.inference_mode():
        for _ in range(3):
            decoder._step(4, decoder.slots.capacity)
    assert addresses(decoder) == before


def test_graphs_are_proved_for_one_attention_backend() -> None:
    assert graph_path("fedsim_varlen") == "decode_graph/varlen" and graph_path("fedsim_fused") == "decode_graph/sdpa"
