"""The numbers of the slots: who draws, who stands still, who changes places."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.generate.slot_state import State

EOS = torch.tensor([7])
SOUND = torch.tensor([True] * 3)
NONE = [np.zeros(0)] * 3


def exchange(state: State, one: int, other: int) -> None:
    order = list(range(3))
    order[one], order[other] = other, one
    state.move(order, torch.tensor([one, other]), torch.tensor([other, one]))


def test_slots_end_at_their_limit_or_an_end_token_and_then_stand_still() -> None:
    state = State(3, 4, torch.device("cpu"))
    uniforms = [np.arange(limit) / 10 + slot for slot, limit in enumerate([2, 4, 4])]
    state.begin(0, [5, 9, 2], [2, 4, 4], [1.0, 0.5, 2.0], uniforms)
    for tokens in ([10, 20, 30], [11, 7, 31], [12, 22, 32]):
        state.advance(0, 3, torch.tensor(tokens), SOUND[:3], EOS)
    assert state.read(3) == ([2, 2, 3], [0, 0, 1], [1, 1, 1])
    assert state.places.tolist() == [5 + 1, 9 + 1, 2 + 2], "an ended slot's place is not past what it holds"
    assert state.outs([0, 1, 2], [2, 2, 3]) == [[10, 11], [20, 7], [30, 31, 32]]
    exchange(state, 0, 2)
    assert state.uniforms_of(0, 2).tolist() == [2.3, 1.2]
    assert state.temperatures.tolist() == [2.0, 0.5, 1.0]
    assert state.outs([0, 2], [3, 2]) == [[30, 31, 32], [10, 11]]
    state.advance(0, 1, torch.tensor([33]), SOUND[:1], EOS)
    assert state.read(1) == ([4], [0], [1]) and state.outs([0], [4]) == [[30, 31, 32, 33]]


def test_a_turn_is_unsound_once_one_of_its_tokens_is() -> None:
    """What is drawn behind a turn's end does not count; the next turn begins anew."""
    state = State(3, 4, torch.device("cpu"))
    state.begin(0, [5, 9, 2], [1, 4, 4], [0.0] * 3, NONE)
    for sound in ([True, True, True], [False, False, True], [False, True, True]):
        state.advance(0, 3, torch.tensor([1, 2, 3]), torch.tensor(sound), EOS)
    assert state.read(3) == ([1, 3, 3], [0, 1, 1], [1, 0, 1])
    exchange(state, 1, 2)
    assert state.read(3)[2] == [1, 1, 0]
    state.begin(2, [3], [2], [0.0], NONE[:1])
    assert state.read(3)[2] == [1, 1, 1]


def test_a_cleared_state_is_a_new_one_in_the_same_place() -> None:
    state = State(3, 4, torch.device("cpu"))
    state.begin(0, [5, 9, 2], [2, 4, 4], [0.0] * 3, NONE)
    state.advance(0, 3, torch.tensor([1, 2, 3]), SOUND, EOS)
    exchange(state, 0, 2)
    address = state.ids.data_ptr()
    state.clear()
    new = State(3, 4, torch.device("cpu"))
    assert torch.equal(state._fields, new._fields) and state._line_of == new._line_of
    assert state.ids.data_ptr() == address
