"""Two quadratic clients on which algorithms have closed forms, and random vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from fedsim.federation.algorithms import Algorithm, RoundSums


@dataclass(frozen=True)
class Quadratics:
    """Clients f_i(w) = a_i/2 (w − b_i)² that take K steps of gradient descent a round."""

    a: tuple[float, ...] = (1.0, 3.0)
    b: tuple[float, ...] = (0.0, 1.0)
    start: float = 2.0
    steps: int = 5
    lr: float = 0.05
    rows: tuple[float, ...] = (1.0, 1.0)

    @property
    def optimum(self) -> float:
        """The minimum of Σ f_i."""
        return sum(a * b for a, b in zip(self.a, self.b, strict=True)) / sum(self.a)

    @property
    def pulls(self) -> list[float]:
        """1 − ρ_i with ρ_i = (1 − lr a_i)^K: without corrections y_i − x = (1 − ρ_i)(b_i − x)."""
        return [1 - (1 - self.lr * a) ** self.steps for a in self.a]

    def fedavg_fixed_point(self) -> float:
        """Σ (1 − ρ_i) b_i / Σ (1 − ρ_i)."""
        return sum(p * b for p, b in zip(self.pulls, self.b, strict=True)) / sum(self.pulls)

    def run(self, algorithm: Algorithm, num_rounds: int) -> Path:
        """Through the algorithm's own rules, with plain gradient descent in the place of AdamW."""
        state = algorithm.start(torch.tensor([self.start]))
        controls: list[torch.Tensor | None] = [None] * len(self.a)
        weights = [algorithm.client_weight(n) for n in self.rows]
        path = Path()
        for _ in range(num_rounds):
            weighted, control_delta = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                correction = algorithm.correction(state, controls[i])
                values = state.adapter.clone()
                for _ in range(self.steps):
                    grad = a * (values - b)
                    correction.on_loss_gradient(grad, values)
                    correction.on_gradient(grad)
                    values -= self.lr * grad
                    correction.on_values(values, self.lr)
                weighted += weights[i] * (values - state.adapter).double()
                if algorithm.has_control:
                    old = controls[i] if controls[i] is not None else torch.zeros(1)
                    controls[i] = correction.next_control(state.adapter, values, self.lr)
                    control_delta += (controls[i] - old).double()
            sums = RoundSums(weighted, sum(weights), control_delta if algorithm.has_control else None, len(self.a))
            state = algorithm.server_step(state, sums)
            path.values.append(float(state.adapter))
        path.controls = [0.0 if c is None else float(c) for c in controls]
        return path


@dataclass
class Path:
    """Global w after each round, and the clients' last control variates."""

    values: list[float] = field(default_factory=list)
    controls: list[float] = field(default_factory=list)


def random_vectors(num: int, seed: int = 0, size: int = 1000) -> list[torch.Tensor]:
    """``num`` fp32 vectors of standard normal numbers."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g) for _ in range(num)]


@pytest.fixture(scope="session")
def quadratics() -> type[Quadratics]:
    """``quadratics(**changes).run(algorithm, num_rounds)``."""
    return Quadratics


@pytest.fixture(scope="session")
def vectors() -> object:
    """``vectors(num, seed=0, size=1000)``; see :func:`random_vectors`."""
    return random_vectors
