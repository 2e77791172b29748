"""Token rows to one packed batch: rows one behind the other, without padding."""

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
        spans: where each row lies.
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
        """Sum of each row's targets: ``[targets]`` to ``[rows]``, in a fixed order on any device."""
        rows = torch.arange(self.spans.num_rows, device=values.device)
        return (self.target_rows == rows[:, None]).to(values.dtype) @ values


def num_inputs(row: TokenRow) -> int:
    """Tokens of a row that go through the model: all but its last; one of a row that has no other."""
    return max(len(row) - 1, 1)


def collate(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Pack rows on the CPU and copy them to ``device`` in one piece, without waiting.

    An empty sequence is an error of the caller.
    """
    assert rows, "a batch has at least one row"
    lengths = [num_inputs(row) for row in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = [np.flatnonzero(row.loss_mask[1:]) for row in rows]
    num_targets = [len(place) for place in places]

    inputs, before_target, target_ids, target_rows = put(
        [
            np.concatenate([row.input_ids[:length] for row, length in zip(rows, lengths, strict=True)]),
            np.concatenate([start + place for start, place in zip(starts[:-1], places, strict=True)]),
            np.concatenate([row.input_ids[1:][place] for row, place in zip(rows, places, strict=True)]),
            np.repeat(np.arange(len(rows)), num_targets),
        ],
        device,
    )
    return Batch(
        input_ids=inputs,
        spans=Spans(lengths, device=device),
        before_target=before_target,
        target_ids=target_ids,
        target_rows=target_rows,
        num_targets=tuple(num_targets),
    )
