"""Packed batches of token rows: rows one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.attention.spans import Spans, put
from fedsim.data.chat import TokenRow


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows. A row's last token is only a target and goes through no layer.

    Attributes:
        input_ids: int64 ``[tokens]``.
        spans: position of each row in the batch.
        before_target: int64 ``[targets]``: the token before each target, whose logits predict it.
        target_ids: int64 ``[targets]``.
        target_rows: int64 ``[targets]``: the row of each target.
        num_targets: targets of each row.
    """

    input_ids: torch.Tensor
    spans: Spans
    before_target: torch.Tensor
    target_ids: torch.Tensor
    target_rows: torch.Tensor
    num_targets: tuple[int, ...]

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over each row's targets: ``[targets]`` to ``[rows]``, in a fixed order."""
        rows = torch.arange(self.spans.num_rows, device=values.device)
        return (self.target_rows == rows[:, None]).to(values.dtype) @ values


def num_inputs(row: TokenRow) -> int:
    """Tokens of a row that go through the model: all but the last, at least one."""
    return max(len(row) - 1, 1)


def collate(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Pack rows on the CPU and copy them to ``device`` in one piece, without waiting.

    An empty sequence is an error of the caller.
    """
    assert rows, "a batch has at least one row"
    # Of each row: tokens that go through the model, its first place, and the inputs that have a
    # target behind them.
    lengths = [num_inputs(row) for row in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = [np.flatnonzero(row.loss_mask[1:]) for row in rows]
    num_targets = [len(place) for place in places]

    # All rows one behind the other: inputs [tokens]; before, targets and of_row [targets].
    inputs, before, targets = [], [], []
    for row, start, length, place in zip(rows, starts[:-1], lengths, places, strict=True):
        inputs.append(row.input_ids[:length])
        before.append(start + place)
        targets.append(row.input_ids[1:][place])
    of_row = np.repeat(np.arange(len(rows)), num_targets)

    # One copy to the device.
    packed = [np.concatenate(inputs), np.concatenate(before), np.concatenate(targets), of_row]
    input_ids, before_target, target_ids, target_rows = put(packed, device)
    return Batch(
        input_ids=input_ids,
        spans=Spans(lengths, device=device),
        before_target=before_target,
        target_ids=target_ids,
        target_rows=target_rows,
        num_targets=tuple(num_targets),
    )
