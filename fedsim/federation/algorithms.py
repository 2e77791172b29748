"""Federated algorithms as pure functions on flat vectors: base class, FedAvg, two baselines.

An algorithm decides who takes part, what happens in a local step (:class:`Correction`), what a
client counts in the round's sums, what it reports beside its delta, and how the server turns sums
or updates into the next state. Vectors are fp32 ``[size]``; sums arrive in fp64 (exact mode) or
fp32 (fast mode). The other algorithms are in ``proximal``, ``scaffold`` and ``server_optimizers``;
:mod:`fedsim.extend` lists their names.
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
from fedsim.federation.participation import OneClient, Participation, Pooled, SampledCohort

ADAPTER = "adapter"


@dataclass(frozen=True, eq=False)
class ServerState:
    """State of the server between rounds.

    Attributes:
        adapter: the global adapter x.
        vectors: the algorithm's own vectors by name (control, momentum, second_moment), each as
            long as the adapter.
        num_steps: server steps taken so far; rounds without a training client do not count.
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
class ClientOutcome:
    """Report of a client to the server; the same on every member of its lane.

    Attributes:
        client: its id.
        num_rows: rows it holds after the filter.
        weight: of its delta in the mean (:meth:`Algorithm.client_weight`).
        delta: client adapter − global adapter, fp32 ``[size]``.
        control: c_i⁺, or None.
        control_delta: c_i⁺ − c_i, or None.
        loss: mean loss over the local steps.
        first_loss: loss of the first step.
        num_tokens: tokens trained on.
        seconds: wall-clock time of the training, s.
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


@dataclass(frozen=True, eq=False)
class RoundSums:
    """Sums over the clients that trained in a round.

    Attributes:
        weighted_delta: Σ w_i · (y_i − x), ``[size]``, fp64 or fp32.
        weight: Σ w_i, with the algorithm's weight w_i of a client
            (:meth:`Algorithm.client_weight`).
        control_delta: Σ (c_i⁺ − c_i), ``[size]``, fp64 or fp32, for algorithms with control
            variates.
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
        control = None
        if self.control_deltas is not None:
            control = self.control_deltas.clone()
        deltas, weights = self.deltas.clone(), self.weights.clone()
        return replace(self, deltas=deltas, weights=weights, control_deltas=control)


class Correction:
    """Hooks of an algorithm inside a local step; by default they do nothing.

    Each hook may change its vector in place.
    """

    def on_loss_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> None:
        """Called before clipping: a term of the loss adds its gradient to the batch's here."""

    def on_gradient(self, grad: torch.Tensor) -> None:
        """Called after clipping, before the optimizer."""

    def on_values(self, values: torch.Tensor, lr: float) -> None:
        """Called after the optimizer."""

    def next_control(self, start: torch.Tensor, end: torch.Tensor, lr: float) -> torch.Tensor:
        """The client's next control variate c_i⁺ after its steps, for algorithms that have one.

        Args:
            start: the global adapter x, fp32 ``[size]``.
            end: the client's adapter y, fp32 ``[size]``.
            lr: learning rate of the steps.
        """
        raise AssertionError(f"{type(self).__name__} has no control variates")


class Algorithm(ABC):
    """A federated optimisation algorithm.

    Attributes:
        wants: argument of the server's step: "sums" over the clients (:class:`RoundSums`, one
            reduction), or every client's "updates" (:class:`Updates`), for robust rules; these take
            a cohort's deltas in memory.
        vector_names: the server's vectors beside the adapter.
        has_control: whether clients keep control variates.
    """

    wants: Literal["sums", "updates"] = "sums"
    vector_names: tuple[str, ...] = ()
    has_control = False

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """Participants of each round and their rows: by default a new random cohort."""
        return SampledCohort(federation.num_clients, federation.clients_per_round, seed)

    def start(self, adapter: torch.Tensor) -> ServerState:
        """State before the first round: the initial adapter, and zeros for the other vectors."""
        return ServerState(adapter, {name: torch.zeros_like(adapter) for name in self.vector_names})

    def check(self, state: ServerState, size: int) -> None:
        """Check that ``state`` is one of this algorithm, for an adapter of ``size`` numbers.

        Raises:
            CheckpointError: it is not; names the vector.
        """
        # The names of the vectors, then the form of each.
        wanted = {ADAPTER, *self.vector_names}
        for name in sorted(wanted ^ state.named().keys()):
            fault = "has an unknown"
            if name in wanted:
                fault = "lacks"
            raise CheckpointError(f"the server's state {fault} vector {name}")
        for name, vector in state.named().items():
            if vector.shape != (size,) or vector.dtype != torch.float32:
                form = f"{vector.dtype} {list(vector.shape)}"
                raise CheckpointError(
                    f"the server's vector {name} is {form}, not torch.float32 [{size}]",
                )

    def client_weight(self, rows_weight: float) -> float:
        """Weight of a client's delta in the mean: by default the sum of its rows' weights."""
        return rows_weight

    def correction(self, state: ServerState, client_control: torch.Tensor | None) -> Correction:
        """The algorithm's part in the local steps of a client that starts from ``state``.

        Args:
            client_control: c_i; None before the client's first round, and for algorithms without
                control variates.
        """
        return Correction()

    @abstractmethod
    def server_step(self, state: ServerState, sums: Any) -> ServerState:
        """The next global state, in new tensors.

        All arithmetic is in fp64; each vector is rounded once to fp32.

        Args:
            sums: :class:`RoundSums`, or :class:`Updates` where the algorithm wants these.
        """


class FedAvg(Algorithm):
    """Weighted mean of the updates: x⁺ = x + Σ w_i · delta_i / Σ w_i (McMahan et al. 2017, arXiv 1602.05629)."""

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move by the weighted mean delta."""
        adapter = moved(state.adapter, sums.weighted_delta, sums.weight)
        return ServerState(adapter, num_steps=state.num_steps + 1)


class LocalOnly(FedAvg):
    """Baseline: only client ``federation.local_client`` trains, in every round.

    OpenFedLLM's ``local{i}``. FedAvg with one participant: its adapter is the next global adapter.
    """

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """The one client."""
        return OneClient(federation.local_client)


class Centralised(FedAvg):
    """Baseline: one trainer with the kept rows of all clients."""

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """One trainer with all rows and a whole cohort's steps."""
        return Pooled(federation.num_clients, federation.clients_per_round)


def moved(vector: torch.Tensor, total: torch.Tensor, weight: float) -> torch.Tensor:
    """``vector + total / weight``, formed in fp64 and rounded once to fp32, in new memory."""
    result = reused.empty(len(vector), torch.float32, vector.device)
    size = min(piece_size(vector.device), len(vector))
    # Two rows of fp64 scratch memory: the mean, and the vector's piece.
    scratch = reused.empty(2 * size, torch.float64, vector.device).view(2, size)
    for out, start, part in pieces(result, vector, total):  # each [n], n ≤ size
        mean, x = scratch[:, : len(out)]
        if part.dtype != torch.float64:
            part = mean.copy_(part)
        torch.div(part, weight, out=mean)
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
