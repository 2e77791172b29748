"""Packing: rows one behind the other, each target beside the token that predicts it, the first token never a target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow

CPU = torch.device("cpu")
ROW = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12)


def row(entries: list[tuple[int, bool]]) -> TokenRow:
    return TokenRow(np.array([i for i, _ in entries], dtype=np.int32), np.array([m for _, m in entries], dtype=bool))


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_rows_come_back(rows: list[list[tuple[int, bool]]]) -> None:
    made = [row(r) for r in rows]
    batch = collate(made, CPU)
    lengths = [max(len(r) - 1, 1) for r in rows]
    assert batch.spans.query_lengths == batch.spans.key_lengths == tuple(lengths)
    tokens = batch.input_ids.split(lengths)
    assert [t.tolist() for t in tokens] == [r.input_ids[:n].tolist() for r, n in zip(made, lengths, strict=True)], (
        "without its last token, which predicts nothing"
    )
    want = [
        (i, start + place, int(r.input_ids[place + 1]))
        for i, (r, start) in enumerate(zip(made, np.cumsum([0, *lengths]).tolist(), strict=False))
        for place in range(len(r) - 1)
        if r.loss_mask[place + 1]
    ]
    got = zip(batch.target_rows.tolist(), batch.before_target.tolist(), batch.target_ids.tolist(), strict=True)
    assert list(got) == want
    assert batch.num_targets == tuple(r.num_targets for r in made)
    values = torch.arange(1, len(want) + 1, dtype=torch.float64)
    sums = [sum(v for v, (i, *_) in zip(values.tolist(), want, strict=True) if i == r) for r in range(len(rows))]
    assert batch.row_sums(values).tolist() == sums


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one row"):
        collate([], CPU)
