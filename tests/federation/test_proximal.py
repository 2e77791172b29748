"""FedProx: its fixed point on quadratics in closed form, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.federation.algorithms import FedAvg, ServerState
from fedsim.federation.proximal import FedProx

Vectors = Callable[..., list[torch.Tensor]]


def pulls(problem: Any, mu: float) -> list[float]:
    """p_i of y_i − x = p_i (b_i − x).

    The local problem a/2 (y − b)² + μ/2 (y − x)² has curvature h = a + μ and its minimum at (a b + μ x)/h, so that K
    steps give y − x = (1 − (1 − lr h)^K) · a (b − x)/h.
    """
    return [(1 - (1 - problem.lr * (a + mu)) ** problem.steps) * a / (a + mu) for a in problem.a]


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("mu", [0.3, 4.0])
def test_every_round_and_the_fixed_point_equal_the_closed_form(quadratics: Any, mu: float, steps: int) -> None:
    problem = quadratics(steps=steps)
    path = problem.run(FedProx(mu), 200).values
    p = pulls(problem, mu)
    want = problem.start
    for found in path[:10]:
        want += sum(p_i * (b - want) for p_i, b in zip(p, problem.b, strict=True)) / 2
        assert found == pytest.approx(want, abs=1e-5)
    fixed = sum(p_i * b for p_i, b in zip(p, problem.b, strict=True)) / sum(p)
    assert path[-1] == pytest.approx(fixed, abs=1e-5)


def test_a_stronger_pull_leaves_less_drift(quadratics: Any) -> None:
    """With many local steps FedAvg ends near the plain mean of the b_i; μ → ∞ ends at the optimum."""
    problem = quadratics(steps=60)
    ends = [problem.run(FedProx(mu), 60).values[-1] for mu in (0.0, 1.0, 4.0, 15.0)]
    assert ends[0] == pytest.approx(0.5, abs=0.02)
    drifts = [problem.optimum - end for end in ends]
    assert drifts == sorted(drifts, reverse=True) and drifts[-1] < drifts[0] / 5


def test_without_a_pull_it_is_fedavg_bit_for_bit(quadratics: Any) -> None:
    problem = quadratics()
    assert problem.run(FedProx(0.0), 50).values == problem.run(FedAvg(), 50).values


def test_the_term_is_the_gradient_of_its_loss(vectors: Vectors) -> None:
    x, y, grad = vectors(3)
    leaf = y.clone().requires_grad_()
    (0.7 / 2 * (leaf - x).square().sum()).backward()
    found, values = grad.clone(), y.clone()
    correction = FedProx(0.7).correction(ServerState(x), None)
    correction.on_loss_gradient(found, values)
    assert leaf.grad is not None
    torch.testing.assert_close(found, grad + leaf.grad, rtol=1e-6, atol=1e-6)
    correction.on_gradient(found)
    correction.on_values(values, 0.1)
    assert torch.equal(values, y)
