"""Positions of the rows in a packed batch, where rows follow one another without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


class Spans:
    """Row i has ``query_lengths[i]`` queries, which are the last of its ``key_lengths[i]`` positions.

    Attention is causal inside a row and never crosses rows. Index tensors are made on the CPU when they are first asked
    for, and copied to the device without waiting for it.

    Args:
        query_lengths: each at least 1.
        key_lengths: each at least the row's queries; None: a row has no positions but its queries.
        device: where queries and keys are.
    """

    def __init__(
        self, query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None, *, device: torch.device
    ) -> None:
        self.query_lengths = tuple(query_lengths)
        self.key_lengths = self.query_lengths if key_lengths is None else tuple(key_lengths)
        assert self.query_lengths and min(self.query_lengths) > 0, "a packed batch has rows, and a row has queries"
        assert all(q <= k for q, k in zip(self.query_lengths, self.key_lengths, strict=True))
        self.device = device
        self.max_query = max(self.query_lengths)
        self.max_key = max(self.key_lengths)
        self._hidings: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.query_lengths)

    @property
    def num_queries(self) -> int:
        """Packed queries."""
        return sum(self.query_lengths)

    @property
    def is_plain(self) -> bool:
        """Return whether a row's positions are its queries, as in training."""
        return self.query_lengths == self.key_lengths

    @property
    def is_even(self) -> bool:
        """Return whether all rows are alike, so that a padded batch is a view of the packed one."""
        return len(set(self.query_lengths)) == len(set(self.key_lengths)) == 1

    def row_mask(self, row: int, window: int | None, dtype: torch.dtype) -> tuple[bool, torch.Tensor | None]:
        """How one row is attended to by itself.

        Args:
            window: a query sees itself and so many − 1 positions before it; None: all before it.
            dtype: of queries and keys.

        Returns:
            Whether plain causal attention is all it takes, and else what is added to the scores, 0 or −∞
            ``[queries, positions]``; None where the row's only query sees all of its positions.
        """
        queries, keys = self.query_lengths[row], self.key_lengths[row]
        if window is None or window >= keys:
            if queries == keys:
                return True, None
            if queries == 1:
                return False, None
        ahead = self._most_ahead
        return False, self._hiding(window, dtype)[:queries, ahead - (keys - queries) : ahead + queries]

    @cached_property
    def _most_ahead(self) -> int:
        """Positions before a row's first query, of the row that has most."""
        return max(k - q for q, k in zip(self.query_lengths, self.key_lengths, strict=True))

    def _hiding(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """``[max_query, _most_ahead + max_query]``: 0 or −∞; every row's is a part of it.

        Column ``_most_ahead + i`` is the position of the row's i-th query.
        """
        if (window, dtype) not in self._hidings:
            behind = torch.arange(self.max_query)[:, None] - torch.arange(-self._most_ahead, self.max_query)
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._hidings[window, dtype] = zeros.masked_fill_(hidden.to(self.device), -torch.inf)
        return self._hidings[window, dtype]

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``: first query of each row, and the end of the last (``cu_seqlens``)."""
        return put([_starts(self.query_lengths)], self.device)[0].to(torch.int32)

    @cached_property
    def key_starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``: the same of the keys."""
        if self.is_plain:
            return self.query_starts
        return put([_starts(self.key_lengths)], self.device)[0].to(torch.int32)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[1, queries]``: position of each query in its row."""
        parts = [np.arange(k - q, k) for q, k in zip(self.query_lengths, self.key_lengths, strict=True)]
        return put([np.concatenate(parts)], self.device)[0][None]

    @property
    def groups(self) -> list[Group]:
        """The rows, those of similar length together: what a backend that pads takes at once."""
        return self._grouped[0]

    @property
    def real_queries(self) -> torch.Tensor:
        """int64 ``[queries]``: the place of each packed query in the padded groups, one behind the other."""
        return self._grouped[1]

    @cached_property
    def _grouped(self) -> tuple[list[Group], torch.Tensor]:
        queries, keys = self.query_lengths, self.key_lengths
        parts = [sorted(rows) for alike in _alike(range(len(keys)), keys) for rows in _alike(alike, queries)]
        starts, key_starts = _starts(queries), _starts(keys)
        arrays: list[np.ndarray] = []
        real = np.empty(self.num_queries, dtype=np.int64)
        begin = 0
        for rows in parts:
            longest = max(queries[row] for row in rows)
            offsets = np.array([keys[row] - queries[row] for row in rows])
            arrays.append(_places(rows, starts, queries))
            arrays.append(arrays[-1] if self.is_plain else _places(rows, key_starts, keys))
            arrays.append(offsets[:1] if len(set(offsets.tolist())) == 1 else offsets)
            for i, row in enumerate(rows):
                first = begin + i * longest
                real[starts[row] : starts[row + 1]] = np.arange(first, first + queries[row])
            begin += len(rows) * longest
        *found, places = put([*arrays, real], self.device)
        groups = [
            Group(
                len(rows),
                max(queries[row] for row in rows),
                max(keys[row] for row in rows),
                found[3 * i],
                found[3 * i + 1],
                found[3 * i + 2],
                self.is_plain,
            )
            for i, rows in enumerate(parts)
        ]
        return groups, places


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are padded on the right to the longest of them, which is less than twice as long as the shortest.

    Attributes:
        num_rows: of the group.
        max_query: queries of the longest row.
        max_key: positions of the longest row.
        query_places: int64 ``[rows · max_query]``: the packed query at each place; the row's last in the padding.
        key_places: int64 ``[rows · max_key]``: the same of the keys.
        offsets: int64 ``[rows]``, or ``[1]`` if all are equal: positions of a row before its first query.
        is_plain: whether there are none.
    """

    num_rows: int
    max_query: int
    max_key: int
    query_places: torch.Tensor
    key_places: torch.Tensor
    offsets: torch.Tensor
    is_plain: bool
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, init=False)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """bool ``[rows or 1, 1, max_query, max_key]``: who sees whom in the padded group; made on the device, once.

        No real query sees the padding on its right, so that rows of equal offset share one mask.

        Args:
            window: a query sees itself and so many − 1 positions before it; None: all before it.

        Returns:
            None where plain causal attention is all it takes.
        """
        if window is not None and window >= self.max_key:
            window = None
        if self.is_plain and window is None:
            return None
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> torch.Tensor:
        device = self.offsets.device
        # Padding behind a row stays inside the longest, so that it sees something: a softmax over nothing is NaN.
        query = (self.offsets[:, None] + torch.arange(self.max_query, device=device)).clamp(max=self.max_key - 1)
        ahead = query[:, :, None] - torch.arange(self.max_key, device=device)
        seen = ahead >= 0
        if window is not None:
            seen &= ahead < window
        return seen[:, None]


def put(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays of integers to ``device`` as int64, flat, in one piece, without waiting for it.

    Returns:
        A view of the copy for each.
    """
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
    return list(to_device(packed, device).split([array.size for array in arrays]))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor without waiting: to CUDA from pinned memory, since a copy from any other waits."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """``[rows + 1]``: where each row begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _places(rows: Sequence[int], starts: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """``[rows · longest]``: the packed token at each place of rows that are padded with their own last one."""
    longest = np.arange(max(lengths[row] for row in rows))
    return np.concatenate([starts[row] + np.minimum(longest, lengths[row] - 1) for row in rows])


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows by length, the longest first, cut where one is no more than half as long as the first of its group."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        if not groups or 2 * lengths[row] <= lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
