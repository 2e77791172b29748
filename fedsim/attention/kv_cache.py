"""KV cache of slots: each row's keys and values are at the beginning of its own slot."""

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
"""Alignment of a part's memory on a CPU, in bytes."""


def grown(length: int) -> int:
    """The smallest multiple of :data:`GROWTH` that is at least ``length``."""
    return -(-length // GROWTH) * GROWTH


PART: Final = 16
"""Rows that a CPU attends to together if rows differ much in length."""

PART_BYTES: Final = 2**18
"""Bytes whose reading takes about as long as the overhead of one more part of the rows."""

LAYERS: Final = 4
"""Layers in one tensor: few kernels move a slot, and growing copies one part at a time."""


class Slots:
    """Keys and values of rows that are being decoded.

    On a CPU a head's positions are contiguous, which its matrix products read fastest; on CUDA a
    position's heads are, as its kernels require.

    Args:
        num_rows: slots.
        device: of the tensors.
        num_layers: whose keys and values may be allocated together; more layers are taken one by
            one.

    Attributes:
        lengths: positions in use of each slot.
        capacity: positions of each slot.
        moves_by_rows: moved rows are copied one by one, without a temporary copy, as on a CPU;
            else all together, which takes fewer kernels.
        position_bytes: bytes of a position's keys and values in the first layer; 0 before it has
            any.
    """

    def __init__(self, num_rows: int, device: torch.device, num_layers: int = 1) -> None:
        self.lengths = [0] * num_rows
        self.capacity = 0
        self.device = device
        self.moves_by_rows = device.type == "cpu"
        self._num_layers = num_layers
        self.position_bytes = 0
        # From this position on all slots are zero, also of rows that have left.
        self._used = 0
        # Each [keys and values of some layers, rows, capacity, heads, size].
        self._parts: list[torch.Tensor] = []
        # (heads, size) → the part with room, and the number of its tensors that are taken.
        self._open: dict[tuple[int, ...], tuple[int, int]] = {}
        # Part and index of an attention's keys and of its values, and views of both.
        self._found: dict[Place, list[tuple[int, int]]] = {}
        self._kept: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_rows(self) -> int:
        """Slots."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    def reserve(self, length: int) -> None:
        """Make ``length`` positions of every slot writable; lengthens slots as :meth:`lengthen`."""
        self._used = max(self._used, length)
        self.lengthen(length)

    def lengthen(self, length: int) -> None:
        """Make every slot at least ``length`` positions long.

        Their content stays, at another address if they grow.
        """
        if length <= self.capacity:
            return
        self.capacity = grown(length)
        longest = max(self.lengths)

        # Copy part by part, so that only one is there twice; the views are of the old ones.
        self._kept.clear()
        for number, old in enumerate(self._parts):
            new = self._part(len(old), old.shape[3], old.shape[4], old.dtype)
            new[:, :, :longest] = old[:, :, :longest]
            self._parts[number] = new

    def clear(self, begin: int, end: int) -> None:
        """Zero slots ``begin`` to ``end − 1`` for other rows.

        A position behind a row is hidden by adding −∞ to its score and by a weight of 0; neither
        hides an infinity that an earlier row has left.
        """
        self.lengths[begin:end] = [0] * (end - begin)
        if self._used:
            for part in self._parts:
                part[:, begin:end, : self._used] = 0
        if end - begin == self.num_rows:
            self._used = 0

    def kept(
        self,
        place: Place,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of an attention: ``[rows, capacity, heads, size]`` each, views.

        Heads and size are those of ``key`` and of ``value``, whose heads may have another size.
        """
        views = self._kept.get(place)
        if views is not None:
            return views
        found = self._found.get(place)
        if found is None:
            found = self._found[place] = self._take(key, value)
        keys, values = (self._parts[part][index] for part, index in found)
        self._kept[place] = keys, values
        if not self.position_bytes:
            for part in (keys, values):
                self.position_bytes += part.shape[2] * part.shape[3] * part.element_size()
        return keys, values

    def move(
        self,
        order: Sequence[int],
        to: torch.Tensor,
        source: torch.Tensor,
        longest: int,
    ) -> None:
        """Reorder the slots: slot i gets the length of slot ``order[i]``.

        Args:
            order: for each slot, the one whose length it gets.
            to: int64 ``[moved]``, on the device: slots that get the content of another that has
                any.
            source: int64 ``[moved]``: the slots that they get it from.
            longest: most positions in use of any slot, also by a row that has left.
        """
        self.lengths = [self.lengths[slot] for slot in order]
        # A row that has ended may have written one position behind its end.
        held = slice(0, longest + 1)
        if self.moves_by_rows:
            written, read = to.tolist(), source.tolist()
            if not set(written) & set(read):
                for slot, row in zip(written, read, strict=True):
                    for part in self._parts:
                        part[:, slot, held] = part[:, row, held]
                return
        if len(to):
            for part in self._parts:
                part[:, to, held] = part[:, source, held]

    def _take(self, key: torch.Tensor, value: torch.Tensor) -> list[tuple[int, int]]:
        """Take room for another attention's keys and values: part and index of each."""
        # A new part has room for some layers, with keys and values together if they are alike.
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
            # Large zeros come from the operating system, which gives memory only to positions that
            # are written.
            shape = (num, self.num_rows, heads, self.capacity, size * dtype.itemsize)
            zeros = np.zeros(math.prod(shape) + ALIGNMENT, dtype=np.uint8)
            # Aligned as torch's own tensors: sums must not depend on the address.
            start = -zeros.ctypes.data % ALIGNMENT
            aligned = zeros[start : start + math.prod(shape)].reshape(shape)
            return torch.from_numpy(aligned).view(dtype).transpose(2, 3)
        sizes = (num, self.num_rows, self.capacity, heads, size)
        return torch.zeros(sizes, dtype=dtype, device=self.device)


def parts_of(ends: Sequence[int], position_bytes: int) -> list[tuple[slice, int]]:
    """Split a step's rows into consecutive parts that a CPU attends to together.

    All rows at once take the fewest calls, and read every row's slot as far as the longest goes;
    several parts read less, and are worth it if that saves much.

    Args:
        ends: positions of each row, at least one row.
        position_bytes: of a position's keys and values in one layer.

    Returns:
        The rows of each part, and the positions of its longest row.
    """
    most = max(ends)
    parts = []
    num_spared = 0  # positions
    for begin in range(0, len(ends), PART):
        end = min(begin + PART, len(ends))
        longest = max(ends[begin:end])
        parts.append((slice(begin, end), longest))
        num_spared += (end - begin) * (most - longest)
    if num_spared * position_bytes < PART_BYTES * len(parts):
        return [(slice(0, len(ends)), most)]
    return parts


class Extending:
    """Layout in which some slots grow by several tokens each: prompts, or a further turn.

    Args:
        slots: long enough; their lengths are those before.
        rows: the slots that grow.
        num_new: new tokens of each, at least 1.
    """

    def __init__(self, slots: Slots, rows: Sequence[int], num_new: Sequence[int]) -> None:
        self.slots = slots
        lengths = [slots.lengths[row] + new for row, new in zip(rows, num_new, strict=True)]
        self.spans = Spans(num_new, lengths, device=slots.device)
        self._held = list(zip(rows, lengths, strict=True))

        # Slot of each new token; slot and position of each token that the slots hold then.
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
        # Write the new tokens; attend to them, or to all that the slots hold.
        keys, values = self.slots.kept(place, key, value)
        places = self.spans.positions[0]
        keys[self._rows, places] = key
        values[self._rows, places] = value
        if not self.spans.is_plain:
            key, value = (self._all(part) for part in (keys, values))
        return backend.spans(query, key, value, self.spans, scores)

    def _all(self, part: torch.Tensor) -> torch.Tensor:
        """Pack the slots' content by one kernel; on a CPU row by row, each of them contiguous."""
        if self.slots.device.type == "cpu":
            return torch.cat([part[row, :length] for row, length in self._held])
        return part[self._key_rows, self._key_places]


class Stepping:
    """Layout in which the first slots grow by one token each: a step of decoding.

    Args:
        slots: long enough.
        rows: int64 ``[rows]``: 0, 1, …
        places: int64 ``[rows]``: position of each token, the number of positions before it.
        longest: length of the longest slot that goes on after the step, or more, up to the
            capacity; other slots see at most so many positions.
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
        # Rows, their lengths with the new token, the longest, and a cache that layers share.
        self._parts: list[tuple[slice, torch.Tensor, int, dict[Hashable, torch.Tensor]]] = []
        for some, most in parts:
            lengths = (places[some] + 1).clamp(max=most).to(torch.int32)
            self._parts.append((some, lengths, most, {}))

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
        """Attend as :meth:`attend`, with queries and keys that are not rotated yet."""
        keys, values = self.slots.kept(place, key, value)
        query = rotation.rotated_into(query, key, value, keys, values, self._places)
        return self._attend(backend, query, keys, values, scores)

    def _attend(
        self,
        backend: Backend,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        outs = []
        for some, lengths, longest, shared in self._parts:
            cached = Cached(keys[some], values[some], lengths, longest, shared)
            outs.append(backend.slots(query[some], cached, scores))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
