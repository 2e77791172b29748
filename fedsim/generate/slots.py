"""A KV cache of slots: a row's keys and values stand at the beginning of its own slot, however long others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from fedsim.attention.backends import Backend, Cached, Scores
from fedsim.attention.forward import Place
from fedsim.attention.spans import Spans, put

GROWTH: Final = 128
"""Capacities are multiples of this many positions."""


def grown(length: int) -> int:
    """The smallest multiple of :data:`GROWTH` that is at least ``length``."""
    return -(-length // GROWTH) * GROWTH


class Slots:
    """Keys and values of rows that are being decoded.

    On a CPU a head's positions lie one behind the other, which is what its matrix products read fastest; on CUDA a
    position's heads do, as its kernels want it.

    Attributes:
        lengths: positions of each slot that hold something.
        capacity: positions of each slot.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.lengths = [0] * num_rows
        self.capacity = 0
        self.device = device
        self._used = 0  # no slot holds anything from here on, not even what is no longer its row's
        self._kept: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_rows(self) -> int:
        """Slots."""
        return len(self.lengths)

    def reserve(self, length: int) -> None:
        """Make every slot at least ``length`` positions long, all of which may be written from now on.

        What slots hold stays; where they are not long enough, at another address.
        """
        self._used = max(self._used, length)
        if length <= self.capacity:
            return
        self.capacity = grown(length)
        longest = max(self.lengths)
        for place, old in self._kept.items():
            new = self._buffer(old[0]), self._buffer(old[1])
            for to, come in zip(new, old, strict=True):
                to[:, :longest] = come[:, :longest]
            self._kept[place] = new

    def clear(self, begin: int, end: int) -> None:
        """Slots ``begin`` to ``end − 1`` are for other rows, which may meet nothing of what these held.

        A position behind a row is hidden by adding −∞ to its score and by a weight of 0; neither hides an infinity.
        """
        self.lengths[begin:end] = [0] * (end - begin)
        if self._used:
            for buffers in self._kept.values():
                for buffer in buffers:
                    buffer[begin:end, : self._used] = 0
        if end - begin == self.num_rows:
            self._used = 0

    def kept(self, place: Place, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of an attention: ``[rows, capacity, heads, size]`` each.

        Heads and size are those of ``key`` and of ``value``, whose heads may have another size.
        """
        found = self._kept.get(place)
        if found is None:
            found = self._kept[place] = self._buffer(key), self._buffer(value)
        return found

    def exchange(self, one: int, other: int) -> None:
        """Two slots take each other's place."""
        if one == other:
            return
        lengths = self.lengths
        if lengths[one] > lengths[other]:
            one, other = other, one
        short, length = lengths[one], lengths[other]
        for buffers in self._kept.values():
            for buffer in buffers:
                kept = buffer[one, :short].clone()
                buffer[one, :length] = buffer[other, :length]
                buffer[other, :short] = kept
        lengths[one], lengths[other] = length, short

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        heads, size = like.shape[-2:]
        if self.device.type == "cpu":
            return like.new_zeros(self.num_rows, heads, self.capacity, size).transpose(1, 2)
        return like.new_zeros(self.num_rows, self.capacity, heads, size)


class Extending:
    """Some slots grow by several tokens each: prompts, or what a further turn adds.

    Args:
        slots: long enough; their lengths are those before.
        rows: which.
        num_new: tokens of each, at least 1.
    """

    def __init__(self, slots: Slots, rows: Sequence[int], num_new: Sequence[int]) -> None:
        self.slots = slots
        lengths = [slots.lengths[row] + new for row, new in zip(rows, num_new, strict=True)]
        self.spans = Spans(num_new, lengths, device=slots.device)
        places = np.concatenate([np.arange(length) for length in lengths])
        self._rows, self._key_rows, self._key_places = put(
            [np.repeat(rows, num_new), np.repeat(rows, lengths), places], slots.device
        )

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        keys, values = self.slots.kept(place, key, value)
        places = self.spans.positions[0]
        keys[self._rows, places] = key
        values[self._rows, places] = value
        if not self.spans.is_plain:
            key, value = keys[self._key_rows, self._key_places], values[self._key_rows, self._key_places]
        return backend.spans(query, key, value, self.spans, scores)


class Stepping:
    """The first slots grow by one token each.

    Args:
        slots: long enough.
        rows: int64 ``[rows]``: 0, 1, …
        places: int64 ``[rows]``: where the token of each goes, which is how many positions it sees before itself.
        longest: of the slots that go on after the step, or more, up to the capacity; others see so much at most.
    """

    def __init__(self, slots: Slots, rows: torch.Tensor, places: torch.Tensor, longest: int) -> None:
        self.slots = slots
        self.longest = longest
        self._rows = rows
        self._places = places
        self._lengths = (places + 1).clamp(max=longest).to(torch.int32)

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        keys, values = (part[: len(self._rows)] for part in self.slots.kept(place, key, value))
        keys[self._rows, self._places] = key
        values[self._rows, self._places] = value
        return backend.slots(query, Cached(keys, values, self._lengths, self.longest), scores)
