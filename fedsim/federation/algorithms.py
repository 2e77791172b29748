"""FedAvg and SCAFFOLD as pure functions on flat vectors.

An algorithm says what happens in a local step (:class:`Correction`), what a client reports beside its delta, and how
the server turns the round's sums into the next state. Vectors are fp32 ``[size]``; sums arrive in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fedsim.errors import ConfigError


@dataclass(frozen=True, eq=False)
class ServerState:
    """What the server carries from round to round.

    Attributes:
        adapter: the global adapter x.
        control: the server's control variate c (SCAFFOLD), else None.
    """

    adapter: torch.Tensor
    control: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RoundSums:
    """Sums over the clients that trained in a round.

    Attributes:
        weighted_delta: Σ w_i · (y_i − x), fp64 ``[size]``.
        weight: Σ w_i, with w_i the client's number of rows.
        control_delta: Σ (c_i⁺ − c_i), fp64 ``[size]``, for algorithms with control variates.
        num_clients: all clients of the federation, N.
    """

    weighted_delta: torch.Tensor
    weight: float
    control_delta: torch.Tensor | None
    num_clients: int


class Correction(Protocol):
    """What an algorithm does inside a local step; both may change their vector in place."""

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Called after clipping, before the optimizer."""
        ...

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Called after the optimizer."""
        ...


class NoCorrection:
    """Plain local training."""

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Leaves the gradient as it is."""

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Leaves the values as they are."""


class GradientCorrection:
    """SCAFFOLD as published: g + (c − c_i) (Karimireddy et al. 2020, algorithm 1, line 10)."""

    def __init__(self, correction: torch.Tensor) -> None:
        self.correction = correction

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Adds c − c_i."""
        grad.add_(self.correction)

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Leaves the values as they are."""


class ValueCorrection:
    """SCAFFOLD as in OpenFedLLM: y ← y − lr · (c − c_i) after the optimizer's step."""

    def __init__(self, correction: torch.Tensor) -> None:
        self.correction = correction

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Leaves the gradient as it is."""

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Subtracts lr · (c − c_i)."""
        values.sub_(self.correction, alpha=lr)


class Algorithm(Protocol):
    """A federated optimisation algorithm."""

    has_control: bool

    def correction(self, control: torch.Tensor | None, client_control: torch.Tensor | None) -> Correction:
        """The local step's correction for a client with control variate c_i (None before its first round: zero)."""
        ...

    def client_control(
        self, start: torch.Tensor, end: torch.Tensor, correction: torch.Tensor, num_steps: int, lr: float
    ) -> torch.Tensor:
        """The client's next control variate c_i⁺."""
        ...

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """The next global state."""
        ...


class FedAvg:
    """x⁺ = x + Σ w_i · delta_i / Σ w_i (McMahan et al. 2017)."""

    has_control = False

    def correction(self, control: torch.Tensor | None, client_control: torch.Tensor | None) -> Correction:
        """None."""
        return NoCorrection()

    def client_control(
        self, start: torch.Tensor, end: torch.Tensor, correction: torch.Tensor, num_steps: int, lr: float
    ) -> torch.Tensor:
        """FedAvg has no control variates."""
        raise AssertionError("FedAvg has no control variates")

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move by the weighted mean delta."""
        return ServerState(moved(state.adapter, sums.weighted_delta / sums.weight), None)


class Scaffold:
    """SCAFFOLD with option II control variates (Karimireddy et al. 2020).

    c_i⁺ = (x − y)/(K · lr) − (c − c_i); c⁺ = c + Σ (c_i⁺ − c_i) / N, uniform over all N clients; the model moves by the
    mean delta weighted by rows (as OpenFedLLM does).

    Args:
        variant: "openfedllm" corrects the values after the optimizer's step, "gradient" the gradient before it.
    """

    has_control = True

    def __init__(self, variant: str) -> None:
        if variant not in ("openfedllm", "gradient"):
            raise ConfigError(f"federation.scaffold_correction={variant!r}: must be openfedllm or gradient")
        self.variant = variant

    def correction(self, control: torch.Tensor | None, client_control: torch.Tensor | None) -> Correction:
        """c − c_i, applied where the variant says."""
        assert control is not None
        difference = control if client_control is None else control - client_control
        return GradientCorrection(difference) if self.variant == "gradient" else ValueCorrection(difference)

    def client_control(
        self, start: torch.Tensor, end: torch.Tensor, correction: torch.Tensor, num_steps: int, lr: float
    ) -> torch.Tensor:
        """c_i⁺ = (x − y)/(K · lr) − (c − c_i), formed in fp64."""
        estimate = (start.double() - end.double()) / (num_steps * lr)
        return (estimate - correction.double()).float()

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move the adapter by the weighted mean delta and c by the uniform mean of all clients' changes."""
        assert state.control is not None and sums.control_delta is not None
        adapter = moved(state.adapter, sums.weighted_delta / sums.weight)
        return ServerState(adapter, moved(state.control, sums.control_delta / sums.num_clients))


def moved(vector: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """``vector + by``, formed in fp64 and rounded once to fp32."""
    return (vector.double() + by).float()


def build_algorithm(name: str, scaffold_variant: str) -> Algorithm:
    """The algorithm that ``federation.algorithm`` names."""
    if name == "fedavg":
        return FedAvg()
    if name == "scaffold":
        return Scaffold(scaffold_variant)
    raise ConfigError(f"federation.algorithm={name!r}: must be fedavg or scaffold")
