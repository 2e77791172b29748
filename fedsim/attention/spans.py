"""Positions of the rows in a packed batch, in which rows follow one another without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


class Spans:
    """Lengths of the rows: the queries of row i are the last ``query_lengths[i]`` of its positions.

    Attention is causal inside a row and never crosses rows. Index tensors are made on the CPU when
    they are first asked for, and copied to the device without waiting for it.

    Args:
        query_lengths: queries of each row, at least 1.
        key_lengths: positions of each row, at least its queries; None: the queries are all.
        device: of queries and keys.
    """

    def __init__(
        self,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        *,
        device: torch.device,
    ) -> None:
        self.query_lengths = tuple(query_lengths)
        self.key_lengths = self.query_lengths if key_lengths is None else tuple(key_lengths)
        assert self.query_lengths, "a packed batch has rows"
        assert min(self.query_lengths) > 0, "a row has queries"
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
        """Return whether all rows have the same lengths: padding them makes a view, no copy."""
        return len(set(self.query_lengths)) == len(set(self.key_lengths)) == 1

    def row_mask(
        self,
        row: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> tuple[bool, torch.Tensor | None]:
        """Return the mask of one row that is attended to by itself.

        Args:
            row: its index.
            window: a query sees itself and so many − 1 positions before it; None: all before it.
            dtype: of queries and keys.

        Returns:
            True and None for plain causal attention. Else False and the mask to add to scores, 0
            or −∞ ``[queries, positions]``; None if the row's only query sees all of its positions.
        """
        queries, keys = self.query_lengths[row], self.key_lengths[row]
        if window is None or window >= keys:
            if queries == keys:
                return True, None
            if queries == 1:
                return False, None
        # A part of the largest mask: the row's positions before and among its queries.
        ahead = self._most_ahead
        begin, end = ahead - (keys - queries), ahead + queries
        return False, self._hiding(window, dtype)[:queries, begin:end]

    @cached_property
    def _most_ahead(self) -> int:
        """Most positions of a row before its first query."""
        return max(k - q for q, k in zip(self.query_lengths, self.key_lengths, strict=True))

    def _hiding(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Mask ``[max_query, _most_ahead + max_query]`` of 0 and −∞, of which a row's is a part.

        Column ``_most_ahead + i`` is the position of the row's i-th query.
        """
        if (window, dtype) not in self._hidings:
            # Distance of each position (column) behind each query (row).
            queries = torch.arange(self.max_query)
            positions = torch.arange(-self._most_ahead, self.max_query)
            behind = queries[:, None] - positions
            hidden = behind < 0
            if window is not None:
                hidden |= behind >= window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._hidings[window, dtype] = zeros.masked_fill_(hidden.to(self.device), -torch.inf)
        return self._hidings[window, dtype]

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``: first query of each row, and the last's end (``cu_seqlens``)."""
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
        lengths = zip(self.query_lengths, self.key_lengths, strict=True)
        parts = [np.arange(keys - queries, keys) for queries, keys in lengths]
        return put([np.concatenate(parts)], self.device)[0][None]

    @property
    def groups(self) -> list[Group]:
        """The rows in groups of similar length, which a backend that pads takes at once."""
        return self._grouped[0]

    @property
    def real_queries(self) -> torch.Tensor:
        """int64 ``[queries]``: place of each packed query among the padded groups' queries."""
        return self._grouped[1]

    @cached_property
    def _grouped(self) -> tuple[list[Group], torch.Tensor]:
        """The groups, and :attr:`real_queries`; all index tensors are copied in one piece."""
        queries, keys = self.query_lengths, self.key_lengths

        # Rows of similar numbers of positions, and of those, rows of similar numbers of queries.
        parts = []
        for alike in _alike(range(len(keys)), keys):
            for rows in _alike(alike, queries):
                parts.append(sorted(rows))

        # Three arrays a group: places of queries and keys, and offsets.
        starts, key_starts = _starts(queries), _starts(keys)
        arrays: list[np.ndarray] = []
        real = np.empty(self.num_queries, dtype=np.int64)
        begin = 0  # the group's first place among all groups' queries
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

        groups = []
        for i, rows in enumerate(parts):
            max_query = max(queries[row] for row in rows)
            max_key = max(keys[row] for row in rows)
            query_places, key_places, offset = found[3 * i : 3 * i + 3]
            group = Group(
                len(rows),
                max_query,
                max_key,
                query_places,
                key_places,
                offset,
                self.is_plain,
            )
            groups.append(group)
        return groups, places


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are padded on the right to the longest, less than twice as long as the shortest.

    Attributes:
        num_rows: of the group.
        max_query: queries of the longest row.
        max_key: positions of the longest row.
        query_places: int64 ``[rows · max_query]``: the packed query at each place; the row's last
            in the padding.
        key_places: int64 ``[rows · max_key]``: the same of the keys.
        offsets: int64 ``[rows]``, or ``[1]`` if all are equal: positions of a row before its first
            query.
        is_plain: no row has positions before its first query.
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
        """Mask of the padded group, bool ``[rows or 1, 1, max_query, max_key]``; True is visible.

        It is made on the device, once. No real query sees the padding on its right, so that rows of
        equal offset share one mask.

        Args:
            window: a query sees itself and so many − 1 positions before it; None: all before it.

        Returns:
            None for plain causal attention.
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
        # Position of each query, [rows or 1, max_query]. Padding behind a row stays inside the
        # longest, so that it sees something: a softmax over nothing is NaN.
        query = self.offsets[:, None] + torch.arange(self.max_query, device=device)
        query = query.clamp(max=self.max_key - 1)
        # Distance of each position behind each query, [rows or 1, max_query, max_key].
        ahead = query[:, :, None] - torch.arange(self.max_key, device=device)
        seen = ahead >= 0
        if window is not None:
            seen &= ahead < window
        return seen[:, None]


def put(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays of integers to ``device`` as int64, flat, in one piece, without waiting for it.

    Returns:
        A view of the copy for each array.
    """
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
    return list(to_device(packed, device).split([array.size for array in arrays]))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor without waiting: to CUDA from pinned memory, as any other copy waits."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """``[rows + 1]``: beginning of each row, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _places(rows: Sequence[int], starts: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """``[rows · longest]``: packed token at each place of rows padded with their last token."""
    places = np.arange(max(lengths[row] for row in rows))
    return np.concatenate([starts[row] + np.minimum(places, lengths[row] - 1) for row in rows])


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Group rows by length, the longest first; a group ends before half the length of its first."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        if not groups or 2 * lengths[row] <= lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
