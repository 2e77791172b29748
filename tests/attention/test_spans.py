"""Places, positions and masks of packed rows against their definition, position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.attention.spans import Spans

CPU = torch.device("cpu")
Rows = list[tuple[int, int]]  # (queries, positions before them) of each row
ROWS = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=6)
WINDOWS = st.none() | st.integers(1, 14)


def made(rows: Rows) -> Spans:
    return Spans([q for q, _ in rows], [q + before for q, before in rows], device=CPU)


def sees(query: int, key: int, window: int | None) -> bool:
    """Whether the query at one position of a row sees the key at another: the definition."""
    return key <= query and (window is None or query - key < window)


@settings(deadline=None)
@given(ROWS)
def test_positions_starts_and_places(rows: Rows) -> None:
    spans = made(rows)
    assert spans.positions[0].tolist() == [before + i for q, before in rows for i in range(q)]
    assert spans.num_rows == len(rows) and spans.num_queries == sum(q for q, _ in rows)
    for starts, lengths in ((spans.query_starts, [q for q, _ in rows]), (spans.key_starts, [sum(r) for r in rows])):
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts.diff().tolist() == lengths
    for places, starts, lengths, longest in (
        (spans.query_places, spans.query_starts, spans.query_lengths, spans.max_query),
        (spans.key_places, spans.key_starts, spans.key_lengths, spans.max_key),
    ):
        padded = places.view(len(rows), longest)
        for row, length in enumerate(lengths):
            first = int(starts[row])
            assert padded[row, :length].tolist() == list(range(first, first + length))
            assert not padded[row, length:].any()
    assert spans.query_places[spans.real_queries].tolist() == list(range(spans.num_queries)), "there and back"


@settings(deadline=None)
@given(ROWS, WINDOWS)
def test_masks_equal_the_definition(rows: Rows, window: int | None) -> None:
    """Every real query of the padded batch sees what the definition says, and no padding."""
    spans = made(rows)
    mask = spans.mask(window)
    if mask is None:  # torch's own causal mask: from the upper left corner
        mask = torch.ones(spans.max_query, spans.max_key, dtype=torch.bool).tril()[None, None]
        assert spans.is_plain
    assert mask.dtype == torch.bool and mask.shape[0] in (1, len(rows)) and mask.shape[1] == 1
    full = mask.expand(len(rows), 1, spans.max_query, spans.max_key)[:, 0]
    for row, (queries, before) in enumerate(rows):
        for i in range(queries):
            wanted = [key < queries + before and sees(before + i, key, window) for key in range(spans.max_key)]
            assert full[row, i].tolist() == wanted


@settings(deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(1, 7), min_size=1, max_size=6), WINDOWS)
def test_rows_of_equal_offset_share_one_mask(before: int, queries: list[int], window: int | None) -> None:
    mask = made([(q, before) for q in queries]).mask(window)
    assert mask is None or len(mask) == 1


@settings(deadline=None)
@given(ROWS, st.integers(0, 3))
def test_a_window_as_long_as_the_longest_row_is_none(rows: Rows, more: int) -> None:
    spans = made(rows)
    assert spans.mask(spans.max_key + more) is spans.mask(None), "and a mask is made once"


def test_plain_causal_attention_needs_no_mask() -> None:
    plain = Spans([3, 1, 4], device=CPU)
    assert plain.is_plain and plain.mask(None) is None and plain.mask(4) is None and plain.mask(3) is not None
    assert plain.key_starts is plain.query_starts and plain.key_places is plain.query_places
    assert Spans([3], [4], device=CPU).mask(None) is not None


@pytest.mark.parametrize(("queries", "keys"), [([], None), ([2, 0], None), ([2], [1]), ([2, 3], [4])])
def test_impossible_lengths_are_refused(queries: list[int], keys: list[int] | None) -> None:
    with pytest.raises((AssertionError, ValueError)):
        Spans(queries, keys, device=CPU)
