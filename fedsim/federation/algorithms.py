"""Base class of federated algorithms, and FedAvg, as pure functions on flat vectors.

An algorithm says who takes part, what happens in a local step (:class:`Correction`), what a client counts in the
round's sums, what it reports beside its delta, and how the server turns sums or updates into the next state. Vectors
are fp32 ``[size]``; sums arrive in fp64 (exact mode) or fp32 (fast mode). The others are in ``proximal``, ``scaffold``,
``server_optimizers`` and ``baselines``; :mod:`fedsim.extend` has their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fedsim.base import reused
from fedsim.base.errors import CheckpointError, ConfigError
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.extend import build
from fedsim.federation.elementwise import piece_size, pieces
from fedsim.federation.participation import Participation, SampledCohort

ADAPTER = "adapter"


@dataclass(frozen=True, eq=False)
class ServerState:
    """What the server carries from round to round.

    Attributes:
        adapter: the global adapter x.
        vectors: the algorithm's own vectors by name (control, momentum, second_moment), each as long as the adapter.
        num_steps: server steps taken so far; rounds in which nobody trained do not count.
    """

    adapter: torch.Tensor
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def named(self) -> dict[str, torch.Tensor]:
        """All vectors by name, the adapter first."""
        assert ADAPTER not in self.vectors
        return {ADAPTER: self.adapter, **self.vectors}

    def to(self, device: torch.device) -> ServerState:
        """The same state on ``device``."""
        vectors = {name: vector.to(device) for name, vector in self.vectors.items()}
        return ServerState(self.adapter.to(device), vectors, self.num_steps)


@dataclass(frozen=True, eq=False)
class RoundSums:
    """Sums over the clients that trained in a round.

    Attributes:
        weighted_delta: Σ w_i · (y_i − x), ``[size]``, fp64 or fp32.
        weight: Σ w_i, with w_i what the algorithm lets the client count (:meth:`Algorithm.client_weight`).
        control_delta: Σ (c_i⁺ − c_i), ``[size]``, fp64 or fp32, for algorithms with control variates.
        num_clients: all clients of the federation, N.
    """

    weighted_delta: torch.Tensor
    weight: float
    control_delta: torch.Tensor | None
    num_clients: int


@dataclass(frozen=True, eq=False)
class Updates:
    """Every update of a round's clients; those that failed or dropped out are absent.

    Attributes:
        clients: their ids, ascending, ``[n]``.
        deltas: y_i − x, fp32 ``[n, size]``.
        weights: w_i (:meth:`Algorithm.client_weight`), fp64 ``[n]``.
        control_deltas: c_i⁺ − c_i, fp32 ``[n, size]``, for algorithms with control variates.
        num_clients: all clients of the federation, N.
    """

    clients: tuple[int, ...]
    deltas: torch.Tensor
    weights: torch.Tensor
    control_deltas: torch.Tensor | None
    num_clients: int

    def copied(self) -> Updates:
        """The same numbers in tensors of their own."""
        control = None if self.control_deltas is None else self.control_deltas.clone()
        return replace(self, deltas=self.deltas.clone(), weights=self.weights.clone(), control_deltas=control)


class Correction:
    """What an algorithm does inside a local step: by default nothing. Each hook may change its vector in place."""

    def on_loss_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> None:
        """Called before clipping, with the batch's gradient: a term of the loss adds its own gradient here."""

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Called after clipping, before the optimizer."""

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Called after the optimizer."""

    def next_control(self, start: torch.Tensor, end: torch.Tensor, lr: float) -> torch.Tensor:
        """The client's next control variate c_i⁺, once its steps are done, for algorithms that have one.

        Args:
            start: the global adapter x.
            end: the client's adapter y.
            lr: learning rate of the steps.
        """
        raise AssertionError(f"{type(self).__name__} has no control variates")


class Algorithm(ABC):
    """A federated optimisation algorithm.

    Attributes:
        wants: what the server's step is given: "sums" over the clients (:class:`RoundSums`, one reduction), or every
            client's "updates" (:class:`Updates`), for robust rules; these take a cohort's deltas in memory.
        vector_names: the server's vectors beside the adapter.
        has_control: whether clients keep control variates.
    """

    wants: Literal["sums", "updates"] = "sums"
    vector_names: tuple[str, ...] = ()
    has_control = False

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """Who trains in each round, and on which rows: by default a cohort drawn anew."""
        return SampledCohort(federation.num_clients, federation.clients_per_round, seed)

    def start(self, adapter: torch.Tensor) -> ServerState:
        """The state before the first round, around the initial adapter; the other vectors start at zero."""
        return ServerState(adapter, {name: torch.zeros_like(adapter) for name in self.vector_names})

    def check(self, state: ServerState, size: int) -> None:
        """Check that ``state`` is one of this algorithm, for an adapter of ``size`` numbers.

        Raises:
            CheckpointError: it is not; names the vector.
        """
        wanted = {ADAPTER, *self.vector_names}
        for name in sorted(wanted ^ state.named().keys()):
            raise CheckpointError(f"the server's state {'lacks' if name in wanted else 'has an unknown'} vector {name}")
        for name, vector in state.named().items():
            if vector.shape != (size,) or vector.dtype != torch.float32:
                raise CheckpointError(
                    f"the server's vector {name} is {vector.dtype} {list(vector.shape)}, not torch.float32 [{size}]"
                )

    def client_weight(self, rows_weight: float) -> float:
        """What a client counts in the mean of the deltas, given Σ of its rows' weights: by default just that."""
        return rows_weight

    def correction(self, state: ServerState, client_control: torch.Tensor | None) -> Correction:
        """The algorithm's part in the local steps of a client that starts from ``state``.

        Args:
            client_control: c_i; None before the client's first round, and for algorithms without control variates.
        """
        return Correction()

    @abstractmethod
    def server_step(self, state: ServerState, sums: Any) -> ServerState:
        """The next global state, in new tensors. All arithmetic is in fp64; each vector is rounded once to fp32.

        Args:
            sums: :class:`RoundSums`, or :class:`Updates` where the algorithm wants these.
        """


class FedAvg(Algorithm):
    """x⁺ = x + Σ w_i · delta_i / Σ w_i (McMahan et al. 2017, arXiv 1602.05629)."""

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move by the weighted mean delta."""
        return ServerState(moved(state.adapter, sums.weighted_delta, sums.weight), num_steps=state.num_steps + 1)


def moved(vector: torch.Tensor, total: torch.Tensor, weight: float) -> torch.Tensor:
    """``vector + total / weight``, formed in fp64 and rounded once to fp32, in new memory."""
    result = reused.empty(len(vector), torch.float32, vector.device)
    size = min(piece_size(vector.device), len(vector))
    scratch = reused.empty(2 * size, torch.float64, vector.device).view(2, size)
    for out, start, part in pieces(result, vector, total):
        mean, x = scratch[:, : len(out)]
        torch.div(part if part.dtype == torch.float64 else mean.copy_(part), weight, out=mean)
        out.copy_(mean.add_(x.copy_(start)))
    return result


def build_algorithm(federation: FederationConfig, server_optimizer: ServerOptimizerConfig) -> Algorithm:
    """The algorithm that ``federation.algorithm`` names, with the variant that its keys choose.

    Raises:
        ConfigError: it cannot be loaded, or its options are wrong (:func:`fedsim.extend.build`).
    """
    sections = {"federation": federation, "server_optimizer": server_optimizer}
    found = build("federation.algorithm", federation.algorithm, federation.options, sections)
    assert isinstance(found, Algorithm)
    if found.wants not in ("sums", "updates"):
        raise ConfigError(
            f"federation.algorithm={federation.algorithm!r}: wants={found.wants!r} must be sums or updates"
        )
    return found
