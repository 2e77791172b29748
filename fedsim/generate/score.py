"""Log-probability of the targets of one unit of rows, and the error for non-finite logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedsim.base.errors import RunError
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.model.logprobs import target_logprobs


@torch.inference_mode()
def score_unit(model: torch.nn.Module, rows: Sequence[TokenRow]) -> list[float]:
    """Sum the target log-probabilities of each row, in fp64 and in order."""
    batch = collate(rows, next(model.parameters()).device)
    return [float(v) for v in batch.row_sums(target_logprobs(model, batch).double()).cpu()]


def unsound(name: str) -> RunError:
    """Return the error for non-finite logits of the rows called ``name``."""
    return RunError(
        f"{name}: the model's logits became NaN or infinite; lower the learning rates, or use "
        "a model.dtype of a larger range (bfloat16 or float32)"
    )


def check_sound(values: Sequence[float], name: str) -> None:
    """Check that each row's result is finite.

    Raises:
        RunError: one is not; the message has ``name`` and the first such row.
    """
    for row, value in enumerate(values):
        if not math.isfinite(value):
            raise unsound(f"{name}, row {row}")
