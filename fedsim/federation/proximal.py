"""FedProx: a pull towards the global adapter in every local step."""

from __future__ import annotations

import torch

from fedsim.federation.algorithms import Correction, FedAvg, ServerState


class ProximalTerm(Correction):
    """Gradient of the proximal term μ/2 · ‖y − x‖².

    Args:
        start: the global adapter x, fp32 ``[size]``.
        mu: μ.
    """

    def __init__(self, start: torch.Tensor, mu: float) -> None:
        self.start = start
        self.mu = mu

    def on_loss_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> None:
        """Add μ (y − x)."""
        grad.add_(values - self.start, alpha=self.mu)


class FedProx(FedAvg):
    """FedProx: clients minimise F_i(y) + μ/2 · ‖y − x‖²; the server averages.

    Li et al. 2020, arXiv 1812.06127, eq. 2.

    The term is part of the loss, so its gradient is clipped together with the data's, as in
    OpenFedLLM (``SFTTrainerFedProx.compute_loss``; the trainer clips after the backward pass). The
    reported loss is that of the data only, so that algorithms compare; OpenFedLLM's includes the
    term. Clients count by their rows, as there (Li et al. draw them in proportion to their rows and
    take the plain mean).

    Args:
        mu: strength of the pull; 0 is FedAvg.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def correction(self, state: ServerState, client_control: torch.Tensor | None) -> Correction:
        """The pull towards the adapter that the client started from."""
        return ProximalTerm(state.adapter, self.mu)
