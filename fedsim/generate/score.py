"""Log-probability of the targets of one unit of rows, and what is said where a model gives none."""

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
    """Sum of the target log-probabilities of each row, in fp64 and in order."""
    batch = collate(rows, next(model.parameters()).device)
    return [float(v) for v in batch.row_sums(target_logprobs(model, batch).double()).cpu()]


def unsound(name: str) -> RunError:
    """The error of logits that are no numbers; ``name`` says whose."""
    return RunError(
        f"{name}: the model's logits became NaN or infinite; lower the learning rates, or use a model.dtype of a "
        "larger range (bfloat16 or float32)",
    )


def check_sound(values: Sequence[float], name: str) -> None:
    """Check that each row's results are numbers.

    Raises:
        RunError: it is not; names the first such row behind ``name``.
    """
    for row, value in enumerate(values):
        if not math.isfinite(value):
            raise unsound(f"{name}, row {row}")
