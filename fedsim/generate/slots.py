"""A KV cache of slots: row i's keys and values stand at the beginning of its own slot, however long the others are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.attention.backends import Backend, Scores
from fedsim.attention.spans import Spans

GROWTH = 128  # positions added when a slot is full


class Slots:
    """Keys and values of rows that are being decoded.

    Attributes:
        lengths: positions of each row that hold something.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.lengths = [0] * num_rows
        self.device = device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_rows(self) -> int:
        """Rows in the cache."""
        return len(self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; the kept ones take the given order."""
        index = torch.tensor(list(rows), device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        longest = max(self.lengths)
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (keys[:, :longest][index], values[:, :longest][index])

    def layer(self, layer: int, like: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers ``[rows, capacity ≥ length, key heads, head size]`` of a layer, grown where they are too short."""
        keys, values = self._layers.get(layer, (None, None))
        if keys is None or values is None or keys.shape[1] < length:
            capacity = -(-length // GROWTH) * GROWTH
            grown = [like.new_zeros(self.num_rows, capacity, *like.shape[1:]) for _ in range(2)]
            if keys is not None and values is not None:
                for new, old in zip(grown, (keys, values), strict=True):
                    new[:, : old.shape[1]] = old
            keys, values = self._layers[layer] = (grown[0], grown[1])
        return keys, values


class Extending:
    """Rows grow by several tokens each: prompts, or what a further turn adds."""

    def __init__(self, slots: Slots, num_new: Sequence[int]) -> None:
        self.slots = slots
        self.rows = [row for row, new in enumerate(num_new) if new]
        lengths = [slots.lengths[row] + num_new[row] for row in self.rows]
        self.spans = Spans([num_new[row] for row in self.rows], lengths, device=slots.device)
        parts = [torch.full((num_new[row],), row) for row in self.rows]
        self._rows = torch.cat(parts).to(slots.device)
        self._index = [
            torch.cat([torch.full((length,), row) for row, length in zip(self.rows, lengths, strict=True)]),
            torch.cat([torch.arange(length) for length in lengths]),
        ]

    def attend(
        self, backend: Backend, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        keys, values = self.slots.layer(layer, key, self.spans.max_key)
        places = self.spans.positions[0]
        keys[self._rows, places] = key
        values[self._rows, places] = value
        if not self.spans.is_plain:
            key, value = keys[self._index[0], self._index[1]], values[self._index[0], self._index[1]]
        return backend.spans(query, key, value, self.spans, scores)


class Stepping:
    """Every row grows by one token."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.places = torch.tensor(slots.lengths, device=slots.device)
        self.lengths = (self.places + 1).to(torch.int32)
        self.longest = max(slots.lengths) + 1
        self._rows = torch.arange(slots.num_rows, device=slots.device)

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[1, rows]``."""
        return self.places[None]

    def attend(
        self, backend: Backend, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        keys, values = self.slots.layer(layer, key, self.longest)
        keys[self._rows, self.places] = key
        values[self._rows, self.places] = value
        return backend.slots(query, keys, values, self.lengths, self.longest, scores)
