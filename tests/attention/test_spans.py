"""Places, positions and masks of packed rows against their definition, position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.attention.spans import Group, Spans

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


def rows_of(group: Group, spans: Spans) -> list[int]:
    """The rows of a group, by where its queries and keys stand."""
    rows = []
    places = group.query_places.view(group.num_rows, -1), group.key_places.view(group.num_rows, -1)
    for queries, keys in zip(*places, strict=True):
        row = spans.query_starts.tolist().index(int(queries[0]))
        first = int(spans.key_starts[row])
        assert queries.tolist() == padded(int(queries[0]), spans.query_lengths[row], group.max_query)
        assert keys.tolist() == padded(first, spans.key_lengths[row], group.max_key)
        rows.append(row)
    return rows


def padded(first: int, length: int, longest: int) -> list[int]:
    return [first + min(i, length - 1) for i in range(longest)]


@settings(deadline=None)
@given(ROWS)
def test_groups_pad_less_than_half(rows: Rows) -> None:
    """Every row once, beside rows more than half as long, in queries and keys; the way back finds every query."""
    spans = made(rows)
    found = [rows_of(group, spans) for group in spans.groups]
    assert sorted(row for part in found for row in part) == list(range(len(rows)))
    for group, part in zip(spans.groups, found, strict=True):
        for longest, lengths in ((group.max_query, spans.query_lengths), (group.max_key, spans.key_lengths)):
            assert max(lengths[row] for row in part) == longest < 2 * min(lengths[row] for row in part)
    places = torch.cat([group.query_places for group in spans.groups])
    assert places[spans.real_queries].tolist() == list(range(spans.num_queries)), "there and back"
    if spans.is_even:
        assert len(found) == 1 and places.tolist() == list(range(spans.num_queries))


@pytest.mark.parametrize(("lengths", "places"), [([10] * 12 + [300] * 4, 1320), ([60] + [4] * 64, 316)])
def test_a_long_row_does_not_pad_short_ones(lengths: list[int], places: int) -> None:
    spans = Spans(lengths, device=CPU)
    assert sum(len(group.query_places) for group in spans.groups) == places == sum(lengths)


@settings(deadline=None)
@given(ROWS, WINDOWS)
def test_masks_equal_the_definition(rows: Rows, window: int | None) -> None:
    """Every real query of the padded batch sees what the definition says, and no padding."""
    spans = made(rows)
    for group in spans.groups:
        mask = group.mask(window)
        if mask is None:  # torch's own causal mask: from the upper left corner
            mask = torch.ones(group.max_query, group.max_key, dtype=torch.bool).tril()[None, None]
            assert spans.is_plain
        assert mask.dtype == torch.bool and mask.shape[0] in (1, group.num_rows) and mask.shape[1] == 1
        full = mask.expand(group.num_rows, 1, group.max_query, group.max_key)[:, 0]
        for i, row in enumerate(rows_of(group, spans)):
            queries, before = rows[row]
            for q in range(queries):
                wanted = [k < queries + before and sees(before + q, k, window) for k in range(group.max_key)]
                assert full[i, q].tolist() == wanted


@settings(deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(1, 7), min_size=1, max_size=6), WINDOWS)
def test_rows_of_equal_offset_share_one_mask(before: int, queries: list[int], window: int | None) -> None:
    for group in made([(q, before) for q in queries]).groups:
        mask = group.mask(window)
        assert mask is None or len(mask) == 1


@settings(deadline=None)
@given(ROWS, st.integers(0, 3))
def test_a_window_as_long_as_the_longest_row_is_none(rows: Rows, more: int) -> None:
    for group in made(rows).groups:
        assert group.mask(group.max_key + more) is group.mask(None), "and a mask is made once"


def test_plain_causal_attention_needs_no_mask() -> None:
    plain = Spans([3, 2, 3], device=CPU)
    (group,) = plain.groups
    assert plain.is_plain and group.mask(None) is None and group.mask(3) is None and group.mask(2) is not None
    assert plain.key_starts is plain.query_starts
    behind = Spans([3], [4], device=CPU)
    assert behind.groups[0].mask(None) is not None


@settings(deadline=None, max_examples=50)
@given(ROWS, st.none() | st.integers(1, 12))
def test_a_rows_own_mask_is_the_definition(rows: Rows, window: int | None) -> None:
    spans = made(rows)
    for row, (queries, keys) in enumerate(zip(spans.query_lengths, spans.key_lengths, strict=True)):
        ahead = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (ahead >= 0) & (ahead < (window or keys))
        causal, mask = spans.row_mask(row, window, torch.float32)
        if causal:
            assert mask is None and queries == keys and torch.equal(seen, torch.ones_like(seen).tril())
        else:
            hidden = torch.zeros(queries, keys) if mask is None else mask
            assert torch.equal(hidden, torch.zeros(queries, keys).masked_fill(~seen, -torch.inf))


@pytest.mark.parametrize(("queries", "keys"), [([], None), ([2, 0], None), ([2], [1]), ([2, 3], [4])])
def test_impossible_lengths_are_refused(queries: list[int], keys: list[int] | None) -> None:
    with pytest.raises((AssertionError, ValueError)):
        Spans(queries, keys, device=CPU)
