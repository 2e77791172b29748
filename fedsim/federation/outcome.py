"""A client's report to the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ClientOutcome:
    """What a client reports; the same on every member of its lane.

    Attributes:
        client: its id.
        num_rows: rows it holds after the filter.
        weight: what it counts in the mean of the deltas (:meth:`Algorithm.client_weight`).
        delta: client adapter − global adapter, fp32 ``[size]``.
        control: c_i⁺, or None.
        control_delta: c_i⁺ − c_i, or None.
        loss: mean loss over the local steps.
        first_loss: loss of the first step.
        num_tokens: tokens trained on.
        seconds: wall-clock time of the training.
    """

    client: int
    num_rows: int
    weight: float
    delta: torch.Tensor
    control: torch.Tensor | None
    control_delta: torch.Tensor | None
    loss: float
    first_loss: float
    num_tokens: int
    seconds: float
