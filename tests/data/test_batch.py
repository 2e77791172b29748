"""Collation: right padding, targets shifted by nothing, the first token never a target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow

ROW = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12)


def row(entries: list[tuple[int, bool]]) -> TokenRow:
    return TokenRow(np.array([i for i, _ in entries], dtype=np.int32), np.array([m for _, m in entries], dtype=bool))


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_rows_come_back(rows: list[list[tuple[int, bool]]]) -> None:
    made = [row(r) for r in rows]
    batch = collate(made, 777)
    length = max(len(r) for r in made)
    assert batch.input_ids.shape == batch.targets.shape == (len(rows), length)
    assert batch.input_ids.dtype == torch.int64 and batch.targets.dtype == torch.bool
    for i, r in enumerate(made):
        assert batch.input_ids[i, : len(r)].tolist() == r.input_ids.tolist()
        assert batch.input_ids[i, len(r) :].tolist() == [777] * (length - len(r))
        assert batch.targets[i].tolist() == [False, *r.loss_mask[1:].tolist(), *[False] * (length - len(r))]
    assert int(batch.targets.sum()) == sum(r.num_targets for r in made)
    columns = [j for j in range(length) if bool(batch.targets[:, j].any())]
    assert batch.first_target == (columns[0] if columns else length) >= 1


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one row"):
        collate([], 0)
