"""The numbers of the slots: who draws, who stands still, who changes places."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.generate.state import State

EOS = torch.tensor([7])


def test_slots_end_at_their_limit_or_an_end_token_and_then_stand_still() -> None:
    state = State(3, 4, torch.device("cpu"))
    state.begin(0, [5, 9, 2], [2, 4, 4], [np.arange(limit) / 10 + slot for slot, limit in enumerate([2, 4, 4])])
    for tokens in ([10, 20, 30], [11, 7, 31], [12, 22, 32]):
        state.advance(0, 3, torch.tensor(tokens), EOS)
    assert state.read(3) == ([2, 2, 3], [0, 0, 1])
    assert state.places.tolist() == [5 + 1, 9 + 1, 2 + 2], "an ended slot's place is not past what it holds"
    assert state.outs([0, 1, 2], [2, 2, 3]) == [[10, 11], [20, 7], [30, 31, 32]]
    state.exchange(0, 2)
    assert state.uniforms_of(0, 2).tolist() == [2.3, 1.2]
    assert state.outs([0, 2], [3, 2]) == [[30, 31, 32], [10, 11]]
    state.advance(0, 1, torch.tensor([33]), EOS)
    assert state.read(1) == ([4], [0]) and state.outs([0], [4]) == [[30, 31, 32, 33]]
