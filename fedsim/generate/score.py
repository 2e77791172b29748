"""Log-probability of the targets of one unit of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.model.logprobs import target_logprobs


@torch.inference_mode()
def score_unit(model: torch.nn.Module, rows: Sequence[TokenRow]) -> list[float]:
    """Sum of the target log-probabilities of each row, in fp64 and in order."""
    batch = collate(rows, next(model.parameters()).device)
    return [float(v) for v in batch.row_sums(target_logprobs(model, batch).double()).cpu()]
