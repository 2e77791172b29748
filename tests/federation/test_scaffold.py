"""SCAFFOLD: the two-quadratic oracle, and the update formulas on random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.federation.algorithms import RoundSums, ServerState
from fedsim.federation.scaffold import GradientCorrection, Scaffold, ValueCorrection

Vectors = Callable[..., list[torch.Tensor]]


@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_scaffold_reaches_the_optimum(quadratics: Any, variant: str) -> None:
    """With plain gradient descent both variants take the same step, y − lr (g + c − c_i)."""
    problem = quadratics()
    path = problem.run(Scaffold(variant), 100)
    assert problem.optimum == 0.75
    assert path.values[-1] == pytest.approx(0.75, abs=1e-5)
    want = [a * (0.75 - b) for a, b in zip(problem.a, problem.b, strict=True)]
    assert want == [0.75, -0.75]
    assert path.controls == pytest.approx(want, abs=1e-4)


def test_the_server_moves_model_and_control(vectors: Vectors) -> None:
    """The model by the mean weighted by rows, c by the clients' changes over all N clients."""
    x, c, *rest = vectors(8)
    ys, changes = rest[:3], sum(d.double() for d in rest[3:])
    rows = [10, 300, 45]
    weighted = sum(n * (y.double() - x.double()) for n, y in zip(rows, ys, strict=True))
    before = (x.clone(), c.clone())
    state = Scaffold("gradient").server_step(ServerState(x, {"control": c}), RoundSums(weighted, 355.0, changes, 20))
    want = sum(n * y.double() for n, y in zip(rows, ys, strict=True)) / 355
    torch.testing.assert_close(state.adapter.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.vectors["control"].double(), c.double() + changes / 20, rtol=1e-6, atol=1e-7)
    assert all(v.dtype == torch.float32 for v in state.named().values()) and state.num_steps == 1
    assert torch.equal(x, before[0]) and torch.equal(c, before[1]), "states are not changed in place"


def test_openfedllms_control_is_option_two(vectors: Vectors) -> None:
    x, y, c, c_i = vectors(4)
    steps, lr = 25, 3e-5
    correction = Scaffold("openfedllm").correction(ServerState(x, {"control": c}), c_i)
    values = x.clone()
    for _ in range(steps):
        correction.on_values(values, lr)
    got = correction.next_control(x, y, lr)
    want = (x.double() - y.double()) / (steps * lr) - (c - c_i).double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_under_sgd_both_variants_are_option_two_and_the_mean_gradient(vectors: Vectors, variant: str) -> None:
    """y = x − lr Σ (g_k + c − c_i) gives c_i⁺ = mean g_k = (x − y)/(K lr) − (c − c_i), whatever c and c_i were."""
    c, c_i, x, *grads = vectors(8)
    correction = Scaffold(variant).correction(ServerState(x, {"control": c}), c_i)
    y = x.double()
    for g in grads:
        step = g.clone()
        correction.on_gradient(step)
        y = y - 0.1 * step.double()
        moved = y.float()
        correction.on_values(moved, 0.1)
        y = moved.double()
    got = correction.next_control(x, y.float(), 0.1)
    torch.testing.assert_close(got, torch.stack(grads).mean(0), rtol=1e-3, atol=1e-4)
    option_two = (x.double() - y) / (len(grads) * 0.1) - (c - c_i).double()
    torch.testing.assert_close(got.double(), option_two, rtol=1e-3, atol=1e-4)


def test_corrections_act_where_their_variant_says(vectors: Vectors) -> None:
    c, c_i, start = vectors(3)
    state = ServerState(start, {"control": c})
    for variant, kind in (("gradient", GradientCorrection), ("openfedllm", ValueCorrection)):
        correction = Scaffold(variant).correction(state, c_i)
        assert isinstance(correction, kind)
        grad, values = start.clone(), start.clone()
        correction.on_loss_gradient(grad, values)
        assert torch.equal(grad, start), "the loss has no further term"
        correction.on_gradient(grad)
        correction.on_values(values, 0.01)
        want_grad = start + (c - c_i) if variant == "gradient" else start
        want_values = start if variant == "gradient" else start - 0.01 * (c - c_i)
        torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(values, want_values, rtol=1e-6, atol=1e-7)


def test_control_variates_start_at_zero(vectors: Vectors) -> None:
    x, c = vectors(2)
    start = Scaffold("gradient").start(x)
    assert not start.vectors["control"].any()
    grad = torch.zeros_like(c)
    Scaffold("gradient").correction(ServerState(x, {"control": c}), None).on_gradient(grad)
    assert torch.equal(grad, c), "a new client's c_i is zero"
