"""Token rows to right-padded tensors.

Padding is on the right and attention is causal, so a pad token is never seen by a real one and no mask is needed: the
model runs its causal fast path, and a row's values do not depend on the rows beside it (up to rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.data.chat import TokenRow


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded to the longest.

    Attributes:
        input_ids: int64 ``[rows, length]``.
        targets: bool ``[rows, length]``; True where a token is a target of the loss. The first column is False.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def first_target(self) -> int:
        """Smallest column that holds a target; the length if none does."""
        columns = self.targets.any(dim=0).nonzero()
        return int(columns[0]) if len(columns) else self.targets.shape[1]


def collate(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Stack rows on the CPU; an empty sequence is an error of the caller."""
    assert rows, "a batch has at least one row"
    length = max(len(r) for r in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        targets[i, 1 : len(row)] = row.loss_mask[1:]
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))
