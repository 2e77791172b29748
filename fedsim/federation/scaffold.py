"""SCAFFOLD: control variates take each client's drift out of its local steps."""

from __future__ import annotations

import torch

from fedsim.federation.algorithms import Algorithm, Correction, RoundSums, ServerState, moved
from fedsim.federation.elementwise import elementwise, pieces

CONTROL = "control"


class GradientCorrection(Correction):
    """SCAFFOLD as published: g + (c − c_i).

    Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, line 10. c_i⁺ is the mean of the local
    gradients g, after clipping. With plain gradient descent, the paper's case, that is its option
    II, (x − y)/(K · lr) − (c − c_i). Under AdamW option II would be in the units of AdamW's steps,
    about 1 for each number, and drown a gradient whose whole norm is 1.
    """

    def __init__(self, correction: torch.Tensor) -> None:
        self.correction = correction
        # Σ g over the local steps, fp64 [size].
        self._total = torch.zeros_like(correction, dtype=torch.float64)
        self._num_steps = 0

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Add c − c_i."""
        # The fp64 sum of the gradients, for the next control variate.
        for total, part in pieces(self._total, grad):
            total.add_(part)
        self._num_steps += 1
        grad.add_(self.correction)

    def next_control(self, start: torch.Tensor, end: torch.Tensor, lr: float) -> torch.Tensor:
        """Σ g / K, fp32 ``[size]``."""
        # Over the K local steps.
        (mean,) = elementwise(lambda total: (total / self._num_steps,), self._total)
        return mean


class ValueCorrection(Correction):
    """SCAFFOLD as in OpenFedLLM: y ← y − lr · (c − c_i) after the optimizer.

    ``SCAFFOLD_Callback.on_step_end``.
    """

    def __init__(self, correction: torch.Tensor) -> None:
        self.correction = correction
        self._num_steps = 0

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Subtract lr · (c − c_i)."""
        values.sub_(self.correction, alpha=lr)
        self._num_steps += 1

    def next_control(self, start: torch.Tensor, end: torch.Tensor, lr: float) -> torch.Tensor:
        """Option II: (x − y)/(K · lr) − (c − c_i), formed in fp64, fp32 ``[size]``."""
        scale = self._num_steps * lr  # K · lr
        (control,) = elementwise(
            lambda x, y, c: ((x - y) / scale - c,),
            start,
            end,
            self.correction,
        )
        return control


class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378).

    c⁺ = c + Σ (c_i⁺ − c_i) / N, uniform over all N clients; the model moves by the mean delta
    weighted by rows, with a server learning rate of 1 (both as OpenFedLLM's ``global_aggregate``
    and ``SFTTrainerSCAFFOLD.get_auxiliary_param`` do; the paper's mean of the deltas is uniform
    too). All control variates start at zero.

    Args:
        variant: "openfedllm" corrects the values after the optimizer's step
            (:class:`ValueCorrection`), "gradient" the gradient before it
            (:class:`GradientCorrection`).
    """

    vector_names = (CONTROL,)
    has_control = True

    def __init__(self, variant: str) -> None:
        self._correct = {"openfedllm": ValueCorrection, "gradient": GradientCorrection}[variant]

    def correction(self, state: ServerState, client_control: torch.Tensor | None) -> Correction:
        """c − c_i, applied as the variant says; c_i is zero before the client's first round."""
        difference = state.vectors[CONTROL]  # fp32 [size]
        if client_control is not None:
            difference = difference - client_control
        return self._correct(difference)

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move the adapter by the weighted mean delta, and c by the uniform mean change."""
        assert sums.control_delta is not None
        # Both in fp64, rounded once to fp32 [size].
        adapter = moved(state.adapter, sums.weighted_delta, sums.weight)
        control = moved(state.vectors[CONTROL], sums.control_delta, sums.num_clients)
        return ServerState(adapter, {CONTROL: control}, state.num_steps + 1)
