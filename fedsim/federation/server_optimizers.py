"""Server optimizers whose gradient is −Δ, the round's mean delta.

FedAvgM, FedAdagrad, FedYogi and FedAdam.

Each exists as published (``reddi``) and as OpenFedLLM computes it (``openfedllm``:
``get_proxy_dict`` in ``fed_utils.py``, ``global_aggregate`` in ``fed_global.py``). How the two
differ, with m and v the moments:

    =============  =======================================  =======================================
    what           reddi                                    openfedllm
    =============  =======================================  =======================================
    fedavgm        m = β1 m + Δ, x += lr m                  m = β1 m + (1 − β1) Δ, x += m
    first m        from m = 0                               Δ itself (m = Δ), in fedavgm too
    fedadagrad m   β1 m + (1 − β1) Δ, as the other two      Δ: no momentum
    v grows by     Δ²                                       m²
    =============  =======================================  =======================================

In both, v starts at τ², fedavgm counts clients by their rows, and the three adaptive ones count
each client once.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from fedsim.config import ServerOptimizerConfig
from fedsim.federation.algorithms import Algorithm, RoundSums, ServerState
from fedsim.federation.elementwise import elementwise

MOMENTUM, SECOND_MOMENT = "momentum", "second_moment"


class ServerOptimizer(Algorithm):
    """Base class of the four server optimizers.

    Args:
        settings: variant, learning rate, decays and τ.
    """

    vector_names: tuple[str, ...] = (MOMENTUM,)

    def __init__(self, settings: ServerOptimizerConfig) -> None:
        self.settings = settings
        # True for the formulas of the papers, False for OpenFedLLM's.
        self.is_published = settings.variant == "reddi"

    def averaged(self, momentum: torch.Tensor, delta: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Exponential mean m = β1 m + (1 − β1) Δ in fp64; OpenFedLLM's first m is Δ."""
        if is_first and not self.is_published:
            return delta
        # The published first m starts from 0.
        beta = self.settings.beta1
        return beta * momentum + (1 - beta) * delta


class FedAvgM(ServerOptimizer):
    """Server momentum (Hsu et al. 2019, arXiv 1909.06335): m = β1 m + Δ, x⁺ = x + lr · m.

    lr = 1 and β1 = 0 give FedAvg. The ``openfedllm`` variant is an exponential mean without a
    learning rate.
    """

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Move by the momentum."""

        def formula(
            x: torch.Tensor,
            m: torch.Tensor,
            total: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            delta = total / sums.weight  # Δ
            if self.is_published:
                m = self.settings.beta1 * m + delta
                return x + self.settings.lr * m, m
            m = self.averaged(m, delta, state.num_steps == 0)
            return x + m, m

        # fp32 [size]; the sums are fp64 in exact mode.
        vectors = (state.adapter, state.vectors[MOMENTUM], sums.weighted_delta)
        adapter, momentum = elementwise(formula, *vectors, num_results=2)
        return ServerState(adapter, {MOMENTUM: momentum}, state.num_steps + 1)


class AdaptiveServer(ServerOptimizer):
    """Adaptive server: x⁺ = x + lr · m / (√v + τ), without bias correction.

    Reddi et al. 2021, arXiv 2003.00295, algorithm 2.
    """

    vector_names = (MOMENTUM, SECOND_MOMENT)

    def start(self, adapter: torch.Tensor) -> ServerState:
        """m = 0, v = τ² (the least that algorithm 2 allows)."""
        momentum, moment = torch.zeros_like(adapter), torch.full_like(adapter, self.settings.tau**2)
        return ServerState(adapter, {MOMENTUM: momentum, SECOND_MOMENT: moment})

    def client_weight(self, rows_weight: float) -> float:
        """1: Δ is the plain mean over the cohort (algorithm 2: 1/|S| Σ Δ_i; OpenFedLLM alike)."""
        return 1.0

    def server_step(self, state: ServerState, sums: RoundSums) -> ServerState:
        """Update m, then v, then x."""

        # One piece of each vector, fp64 [n].
        def formula(
            x: torch.Tensor,
            m: torch.Tensor,
            v: torch.Tensor,
            total: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            delta = total / sums.weight  # Δ
            m = self.averaged(m, delta, state.num_steps == 0)
            grown = m  # OpenFedLLM's second moment grows by m²
            if self.is_published:
                grown = delta
            v = self.second_moment(v, grown**2)
            return x + self.settings.lr * m / (v.sqrt() + self.settings.tau), m, v

        vectors = (
            state.adapter,
            state.vectors[MOMENTUM],
            state.vectors[SECOND_MOMENT],
            sums.weighted_delta,
        )
        adapter, momentum, moment = elementwise(formula, *vectors, num_results=3)
        return ServerState(
            adapter,
            {MOMENTUM: momentum, SECOND_MOMENT: moment},
            state.num_steps + 1,
        )

    @abstractmethod
    def second_moment(self, moment: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The next v from the last one and this round's squares, all fp64 ``[size]``."""


class FedAdagrad(AdaptiveServer):
    """Adagrad at the server: v = v + Δ² (Reddi et al. 2021, arXiv 2003.00295).

    OpenFedLLM's has no momentum (its misspelt name there keeps it from running).
    """

    def averaged(self, momentum: torch.Tensor, delta: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Algorithm 2's momentum; Δ itself in OpenFedLLM."""
        if not self.is_published:
            return delta
        return super().averaged(momentum, delta, is_first)

    def second_moment(self, moment: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The sum of all squares."""
        return moment + squares


class FedYogi(AdaptiveServer):
    """Yogi at the server: v = v − (1 − β2) Δ² sign(v − Δ²) (Reddi et al. 2021).

    v grows as fast as Adam's but falls by less.
    """

    def second_moment(self, moment: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """A step of the squares' size towards them."""
        return moment - (1 - self.settings.beta2) * squares * torch.sign(moment - squares)


class FedAdam(AdaptiveServer):
    """Adam at the server: v = β2 v + (1 − β2) Δ² (Reddi et al. 2021, arXiv 2003.00295)."""

    def second_moment(self, moment: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The exponential mean of the squares."""
        return self.settings.beta2 * moment + (1 - self.settings.beta2) * squares
