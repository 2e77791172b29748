"""The slots of the cache: moves, which parts of a batch are attended to together, and what a step launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from fedsim.attention import kv_cache as slots_module
from fedsim.attention.forward import Place
from fedsim.attention.kv_cache import PART, Slots, parts_of
from fedsim.generate.decode import Decoder, Made, Request

CPU = torch.device("cpu")


def filled(num_slots: int, lengths: list[int], num_layers: int) -> Slots:
    """Slots whose content names its slot, layer and position; layer 1 has other head sizes."""
    slots = Slots(num_slots, CPU, num_layers)
    slots.reserve(max(lengths) + 1)
    for layer in range(num_layers):
        sizes = (2, 4) if layer == 1 else (3, 3)
        of = slots.kept(Place(layer), torch.zeros(1, 2, sizes[0]), torch.zeros(1, 2, sizes[1]))
        for kind, tensor in enumerate(of):
            for slot, length in enumerate(lengths):
                values = 1000 * slot + 100 * layer + 10 * kind + torch.arange(length)
                tensor[slot, :length] = values[:, None, None].float()
    slots.lengths = list(lengths)
    return slots


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 6), st.sampled_from([1, 3, 6]), st.booleans())
def test_moves_take_all_that_a_slot_holds_along(
    data: st.DataObject, num_slots: int, num_layers: int, by_rows: bool
) -> None:
    """Against one exchange after the other, in every layer, of keys and of values."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=num_slots, max_size=num_slots))
    order = data.draw(st.permutations(range(num_slots)))
    slots = filled(num_slots, lengths, num_layers)
    slots.moves_by_rows = by_rows
    before = [[tensor.clone() for tensor in slots._kept[Place(layer)]] for layer in range(num_layers)]
    moved = [slot for slot in range(num_slots) if order[slot] != slot and lengths[order[slot]]]
    source = torch.tensor([order[slot] for slot in moved], dtype=torch.int64)
    slots.move(order, torch.tensor(moved, dtype=torch.int64), source, max(lengths))
    assert slots.lengths == [lengths[slot] for slot in order]
    for layer in range(num_layers):
        for tensor, old in zip(slots._kept[Place(layer)], before[layer], strict=True):
            for slot, origin in enumerate(order):
                assert torch.equal(tensor[slot, : lengths[origin]], old[origin, : lengths[origin]])


def test_a_moved_row_meets_nothing_of_the_one_that_left() -> None:
    """A short row takes the slot of a longer one that has ended, whose keys were infinite."""
    slots = filled(2, [9, 3], 1)
    keys, _ = slots._kept[Place(0)]
    keys[0, :10] = torch.inf
    slots.lengths[0] = 0
    slots.move([1, 0], torch.tensor([0]), torch.tensor([1]), 9)
    assert keys[0].isfinite().all() and slots.lengths == [3, 0]


def test_layers_share_tensors_and_no_more_is_allocated_than_they_need() -> None:
    slots = filled(2, [3, 4], 6)
    assert [len(part) for part in slots._parts] == [8, 4, 4, 2] or sum(map(len, slots._parts)) >= 12
    even = Slots(2, CPU, 6)
    even.reserve(3)
    for layer in range(6):
        even.kept(Place(layer), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert [len(part) for part in even._parts] == [8, 4], "keys and values of four layers, then of two"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=70), st.sampled_from([0, 64, 4096, 2**16]))
def test_parts_cover_all_rows_and_see_all_of_each(ends: list[int], position_bytes: int) -> None:
    parts = parts_of(ends, position_bytes)
    assert [row for part, _ in parts for row in range(part.start, part.stop)] == list(range(len(ends)))
    assert all(max(ends[part]) == longest for part, longest in parts)
    assert len(parts) == 1 or len(parts) == -(-len(ends) // PART)


def test_parts_are_worth_it_for_rows_of_different_length_alone() -> None:
    assert len(parts_of([300] * 16 + [100] * 48, 2048)) == 4
    assert len(parts_of([300] * 64, 2048)) == len(parts_of([300] * 16 + [100] * 48, 64)) == 1


def starts(temperature: float) -> list[Request]:
    return [Request([11 + row] * (1 + 37 * row % 90), row, 4 + 23 * row % 61, temperature) for row in range(40)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_however_rows_are_attended_to(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model = make_llama().double()
    counts: list[int] = []
    real = slots_module.parts_of
    found: list[list[list[Made]]] = []
    for part_bytes in (2**40, 0):
        monkeypatch.setattr(slots_module, "PART_BYTES", part_bytes)
        monkeypatch.setattr("fedsim.generate.decode.parts_of", lambda *a: counts.append(len(real(*a))) or real(*a))
        counts.clear()
        decoder = Decoder(model, 40, max_new_tokens=64, eos_ids=frozenset(range(0, 240, 12)))
        found.append(decoder.run(starts(temperature)))
        assert (max(counts) > 1) == (part_bytes == 0)
    assert found[0] == found[1]


def test_what_is_attended_together_does_not_depend_on_a_unit_before(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that finds long slots, and one for which they must grow, are dealt into the same parts."""
    seen: list[list[tuple[slice, int]]] = []
    monkeypatch.setattr(slots_module, "PART_BYTES", 1)
    monkeypatch.setattr("fedsim.generate.decode.parts_of", lambda *a: seen.append(parts_of(*a)) or seen[-1])
    model = make_llama(max_position_embeddings=1024)
    unit = [Request([5 + row] * (4 * row + 1), row, 140, 0.0) for row in range(40)]

    def parts(before: list[Request]) -> list[list[tuple[slice, int]]]:
        decoder = Decoder(model, 40, max_new_tokens=256, eos_ids=frozenset())
        decoder.run(before)
        seen.clear()
        decoder.run(unit)
        return list(seen)

    fresh = parts([])
    assert max(map(len, fresh)) > 1
    assert parts([Request([7] * 500, 0, 4, 0.0)]) == fresh


class Launches(TorchDispatchMode):
    """Counts operations that compute; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_layers", [2, 6])
def test_rows_that_end_together_move_together(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    """One copy into every four layers' tensor, however many rows end in a step, and one of their numbers."""
    seen: list[tuple[int, Counter[str]]] = []
    real = Decoder._collect

    def collect(self: Decoder, *how: Any) -> None:
        before = self._num_active
        with Launches() as launches:
            real(self, *how)
        seen.append((before - self._num_active, launches.counts))

    monkeypatch.setattr(Decoder, "_collect", collect)
    model = make_llama(num_hidden_layers=num_layers)
    # In a batch of 12 rows, one row ends, then three, then all others but the last, which goes on alone.
    limits = [9, 3, 9, 5, 5, 9, 5, 9, 9, 9, 9, 20]
    decoder = Decoder(model, 12, max_new_tokens=20, eos_ids=frozenset())
    decoder.slots.moves_by_rows = False  # as on CUDA
    decoder.run([Request([5 + row] * 4, row, limit, 0.0) for row, limit in enumerate(limits)])
    moves = [(num_ended, counts) for num_ended, counts in seen if num_ended][:3]
    assert [num_ended for num_ended, _ in moves] == [1, 3, 7]
    assert moves[0][1] == moves[1][1] == moves[2][1], "as many launches for one row as for seven"
    num_parts = -(-num_layers // slots_module.LAYERS)
    counts = moves[0][1]
    assert counts["aten::index_put_"] == num_parts, counts
    assert counts["aten::index"] == num_parts + 1, "and one that reads the tokens"
    assert sum(counts.values()) == 2 * num_parts + 3, "and two that move the columns of the state"
