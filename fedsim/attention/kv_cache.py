"""A KV cache of slots: a row's keys and values stand at the beginning of its own slot, however long others are."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Final

import numpy as np
import torch

from fedsim.attention.backends import Backend, Cached, Scores
from fedsim.attention.forward import Place, Rotation
from fedsim.attention.spans import Spans, put

GROWTH: Final = 128
"""Capacities are multiples of this many positions."""

ALIGNMENT: Final = 64
"""Bytes."""


def grown(length: int) -> int:
    """The smallest multiple of :data:`GROWTH` that is at least ``length``."""
    return -(-length // GROWTH) * GROWTH


PART: Final = 16
"""Rows that a CPU attends to together where rows differ much in length."""

PART_BYTES: Final = 2**18
"""Bytes that take about as long to read as a part of the rows takes to be attended to by itself."""

LAYERS: Final = 4
"""Layers whose keys and values are one tensor: few kernels move a slot, and growing copies a part at a time."""


class Slots:
    """Keys and values of rows that are being decoded.

    On a CPU a head's positions lie one behind the other, which is what its matrix products read fastest; on CUDA a
    position's heads do, as its kernels want it.

    Args:
        num_rows: slots.
        device: of the tensors.
        num_layers: whose keys and values may be allocated together; more layers are taken one by one.

    Attributes:
        lengths: positions of each slot that hold something.
        capacity: positions of each slot.
        moves_by_rows: whether a moved row is copied by itself, without a copy in between, as on a CPU; else all
            together, which is fewer kernels.
    """

    def __init__(self, num_rows: int, device: torch.device, num_layers: int = 1) -> None:
        self.lengths = [0] * num_rows
        self.capacity = 0
        self.device = device
        self.moves_by_rows = device.type == "cpu"
        self._num_layers = num_layers
        self._used = 0  # no slot holds anything from here on, not even what is no longer its row's
        self._parts: list[torch.Tensor] = []  # [keys and values of some layers, rows, …]
        self._open: dict[tuple[int, ...], tuple[int, int]] = {}  # by shape: the part with room, and how much is taken
        self._found: dict[Place, list[tuple[int, int]]] = {}  # part and index of keys and of values
        self._kept: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self.position_bytes = 0  # of a position's keys and values in the first layer, once it has any

    @property
    def num_rows(self) -> int:
        """Slots."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    def reserve(self, length: int) -> None:
        """Let ``length`` positions of every slot be written from now on; longer slots as of :meth:`lengthen`."""
        self._used = max(self._used, length)
        self.lengthen(length)

    def lengthen(self, length: int) -> None:
        """Make every slot at least ``length`` positions long.

        What slots hold stays; where they are not long enough, at another address.
        """
        if length <= self.capacity:
            return
        self.capacity = grown(length)
        longest = max(self.lengths)
        self._kept.clear()
        for number, old in enumerate(self._parts):
            new = self._part(len(old), old.shape[3], old.shape[4], old.dtype)
            new[:, :, :longest] = old[:, :, :longest]
            self._parts[number] = new

    def clear(self, begin: int, end: int) -> None:
        """Slots ``begin`` to ``end − 1`` are for other rows, which may meet nothing of what these held.

        A position behind a row is hidden by adding −∞ to its score and by a weight of 0; neither hides an infinity.
        """
        self.lengths[begin:end] = [0] * (end - begin)
        if self._used:
            for part in self._parts:
                part[:, begin:end, : self._used] = 0
        if end - begin == self.num_rows:
            self._used = 0

    def kept(self, place: Place, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of an attention: ``[rows, capacity, heads, size]`` each.

        Heads and size are those of ``key`` and of ``value``, whose heads may have another size.
        """
        views = self._kept.get(place)
        if views is None:
            found = self._found.get(place)
            if found is None:
                found = self._found[place] = self._take(key, value)
            of_keys, of_values = (self._parts[part][index] for part, index in found)
            views = self._kept[place] = of_keys, of_values
            if not self.position_bytes:
                self.position_bytes = sum(part.shape[2] * part.shape[3] * part.element_size() for part in views)
        return views

    def move(self, order: Sequence[int], to: torch.Tensor, source: torch.Tensor, longest: int) -> None:
        """Slot i becomes as long as slot ``order[i]`` is; those of ``to`` get what is in ``source``.

        Args:
            to: int64 ``[moved]``, on the device: all slots that get another's content, if it has any.
            source: int64 ``[moved]``: whose.
            longest: positions that any slot holds, those of a row that has left included.
        """
        self.lengths = [self.lengths[slot] for slot in order]
        held = slice(0, longest + 1)  # a row that has ended may have written one position behind its end
        if self.moves_by_rows and not {*to.tolist()} & {*source.tolist()}:  # what is read is not written
            for slot, row in zip(to.tolist(), source.tolist(), strict=True):
                for part in self._parts:
                    part[:, slot, held] = part[:, row, held]
        elif len(to):
            for part in self._parts:
                part[:, to, held] = part[:, source, held]

    def _take(self, key: torch.Tensor, value: torch.Tensor) -> list[tuple[int, int]]:
        """Room for another attention's keys and values."""
        num_tensors = 2 if key.shape[1:] == value.shape[1:] else 1
        num_layers = max(min(self._num_layers - len(self._found), LAYERS), 1)
        found = []
        for like in (key, value):
            heads, size = like.shape[-2:]
            part, taken = self._open.get((heads, size), (-1, 0))
            if part < 0 or taken == len(self._parts[part]):
                part, taken = len(self._parts), 0
                self._parts.append(self._part(num_tensors * num_layers, heads, size, like.dtype))
            self._open[heads, size] = part, taken + 1
            found.append((part, taken))
        return found

    def _part(self, num: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros ``[num, rows, capacity, heads, size]``."""
        if self.device.type == "cpu":
            # Large zeros come from the operating system, which gives memory only to positions that are written.
            shape = (num, self.num_rows, heads, self.capacity, size * dtype.itemsize)
            zeros = np.zeros(math.prod(shape) + ALIGNMENT, dtype=np.uint8)
            start = -zeros.ctypes.data % ALIGNMENT  # as torch's own tensors: sums must not depend on the address
            aligned = zeros[start : start + math.prod(shape)].reshape(shape)
            return torch.from_numpy(aligned).view(dtype).transpose(2, 3)
        return torch.zeros(num, self.num_rows, self.capacity, heads, size, dtype=dtype, device=self.device)


def parts_of(ends: Sequence[int], position_bytes: int) -> list[tuple[slice, int]]:
    """Consecutive rows of a step that a CPU attends to together, and how many positions the longest of them has.

    All rows at once take the fewest calls, and read every row's slot as far as the longest goes; several parts read
    less, and are worth it where that is much.

    Args:
        ends: positions of each row, at least one row.
        position_bytes: of a position's keys and values in one layer.
    """
    parts = [slice(begin, min(begin + PART, len(ends))) for begin in range(0, len(ends), PART)]
    longest = [max(ends[part]) for part in parts]
    spared = sum((part.stop - part.start) * (max(ends) - most) for part, most in zip(parts, longest, strict=True))
    if spared * position_bytes < PART_BYTES * len(parts):
        return [(slice(0, len(ends)), max(ends))]
    return list(zip(parts, longest, strict=True))


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
        self._held = list(zip(rows, lengths, strict=True))
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
            key, value = (self._all(part) for part in (keys, values))
        return backend.spans(query, key, value, self.spans, scores)

    def _all(self, part: torch.Tensor) -> torch.Tensor:
        """What the slots hold, packed: by one kernel, on a CPU a row at a time, whose positions are one piece."""
        if self.slots.device.type == "cpu":
            return torch.cat([part[row, :length] for row, length in self._held])
        return part[self._key_rows, self._key_places]


class Stepping:
    """The first slots grow by one token each.

    Args:
        slots: long enough.
        rows: int64 ``[rows]``: 0, 1, …
        places: int64 ``[rows]``: where the token of each goes, which is how many positions it sees before itself.
        longest: of the slots that go on after the step, or more, up to the capacity; others see so much at most.
        parts: rows that are attended to together, and the longest of each part; None: all at once.
    """

    def __init__(
        self,
        slots: Slots,
        rows: torch.Tensor,
        places: torch.Tensor,
        longest: int,
        parts: Sequence[tuple[slice, int]] | None = None,
    ) -> None:
        parts = parts or [(slice(0, len(rows)), longest)]
        self.slots = slots
        self._rows = rows
        self._places = places
        of_layers: list[dict[Hashable, torch.Tensor]] = [{} for _ in parts]
        self._parts = [
            (some, (places[some] + 1).clamp(max=most).to(torch.int32), most, shared)
            for (some, most), shared in zip(parts, of_layers, strict=True)
        ]

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
        keys[self._rows, self._places] = key
        values[self._rows, self._places] = value
        return self._attend(backend, query, keys, values, scores)

    def attend_rotating(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
        rotation: Rotation,
    ) -> torch.Tensor:
        """As :meth:`attend`, with queries and keys that are not rotated yet."""
        keys, values = self.slots.kept(place, key, value)
        query = rotation.rotated_into(query, key, value, keys, values, self._places)
        return self._attend(backend, query, keys, values, scores)

    def _attend(
        self, backend: Backend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        outs = [
            backend.slots(query[some], Cached(keys[some], values[some], lengths, longest, shared), scores)
            for some, lengths, longest, shared in self._parts
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
