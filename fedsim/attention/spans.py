"""Where the rows of a packed batch lie: rows stand one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch


class Spans:
    """Row i has ``query_lengths[i]`` queries, which are the last of its ``key_lengths[i]`` positions.

    Attention is causal inside a row and never crosses rows. All index tensors are made on the CPU, before a step, and
    copied to the device once.

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
        self._masks: dict[int | None, torch.Tensor | None] = {}

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
        """Whether a row's positions are its queries, as in training."""
        return self.query_lengths == self.key_lengths

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``: first query of each row, and the end of the last (``cu_seqlens``)."""
        return self._starts(self.query_lengths)

    @cached_property
    def key_starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``: the same of the keys."""
        return self.query_starts if self.is_plain else self._starts(self.key_lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[1, queries]``: position of each query in its row."""
        parts = [np.arange(k - q, k) for q, k in zip(self.query_lengths, self.key_lengths, strict=True)]
        return torch.from_numpy(np.concatenate(parts)[None]).to(self.device)

    @cached_property
    def query_places(self) -> torch.Tensor:
        """int64 ``[rows · max_query]``: the packed query at each place of the padded batch; 0 where there is none."""
        return self._places(self.query_lengths)

    @cached_property
    def key_places(self) -> torch.Tensor:
        """int64 ``[rows · max_key]``: the same of the keys."""
        return self.query_places if self.is_plain else self._places(self.key_lengths)

    @cached_property
    def real_queries(self) -> torch.Tensor:
        """int64 ``[queries]``: the padded batch's place of each packed query."""
        parts = [row * self.max_query + np.arange(length) for row, length in enumerate(self.query_lengths)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """bool ``[rows or 1, 1, max_query, max_key]``: who sees whom in the padded batch.

        Padding is on the right, where no real query sees it, so that rows of equal offset share one mask.

        Args:
            window: a query sees itself and so many − 1 positions before it; None: all before it.

        Returns:
            None where plain causal attention is all it takes.
        """
        if window is not None and window >= self.max_key:
            window = None
        if window not in self._masks:
            self._masks[window] = None if self.is_plain and window is None else self._mask(window).to(self.device)
        return self._masks[window]

    def _mask(self, window: int | None) -> torch.Tensor:
        offsets = sorted({k - q for q, k in zip(self.query_lengths, self.key_lengths, strict=True)})
        if len(offsets) > 1:
            offsets = [k - q for q, k in zip(self.query_lengths, self.key_lengths, strict=True)]
        # Padding behind a row stays inside the longest, so that it sees something: a softmax over nothing is NaN.
        query = (torch.tensor(offsets)[:, None] + torch.arange(self.max_query)).clamp(max=self.max_key - 1)
        ahead = query[:, :, None] - torch.arange(self.max_key)
        seen = ahead >= 0
        if window is not None:
            seen &= ahead < window
        return seen[:, None]

    def _starts(self, lengths: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(self.device)

    def _places(self, lengths: Sequence[int]) -> torch.Tensor:
        places = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
        start = 0
        for row, length in enumerate(lengths):
            places[row, :length] = np.arange(start, start + length)
            start += length
        return torch.from_numpy(places.reshape(-1)).to(self.device)
