"""FedAvg and SCAFFOLD: the two-quadratic oracle in closed form, and the update formulas on random vectors."""

from __future__ import annotations

import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.federation.algorithms import (
    Algorithm,
    FedAvg,
    GradientCorrection,
    NoCorrection,
    RoundSums,
    Scaffold,
    ServerState,
    ValueCorrection,
    build_algorithm,
)

# Two clients f_i(w) = a_i/2 (w − b_i)², K local SGD steps.
A, B, START, STEPS, LR = (1.0, 3.0), (0.0, 1.0), 2.0, 5, 0.05


def run_quadratics(algorithm: Algorithm, num_rounds: int) -> tuple[float, list[float], list[float]]:
    """Global w after each round, and the clients' control variates, through the algorithm's own rules."""
    zero = torch.zeros(1)
    state = ServerState(torch.tensor([START]), zero.clone() if algorithm.has_control else None)
    controls: list[torch.Tensor | None] = [None, None]
    path = []
    for _ in range(num_rounds):
        weighted, control_delta = zero.double(), zero.double()
        for i, (a, b) in enumerate(zip(A, B, strict=True)):
            correction = algorithm.correction(state.control, controls[i])
            values = state.adapter.clone()
            for _ in range(STEPS):
                grad = a * (values - b)
                correction.on_gradient(grad)
                values -= LR * grad
                correction.on_values(values, LR)
            weighted = weighted + (values - state.adapter).double()
            if algorithm.has_control:
                assert state.control is not None
                old = zero if controls[i] is None else controls[i]
                new = algorithm.client_control(state.adapter, values, state.control - old, STEPS, LR)
                control_delta = control_delta + (new - old).double()
                controls[i] = new
        sums = RoundSums(weighted, 2.0, control_delta if algorithm.has_control else None, 2)
        state = algorithm.server_step(state, sums)
        path.append(float(state.adapter))
    return path[-1], [0.0 if c is None else float(c) for c in controls], path


def fedavg_fixed_point() -> float:
    """y_i = b_i + ρ_i (x − b_i) with ρ_i = (1 − lr·a_i)^K; x = mean y_i gives x = Σ(1 − ρ_i) b_i / Σ(1 − ρ_i)."""
    pulls = [1 - (1 - LR * a) ** STEPS for a in A]
    return sum(p * b for p, b in zip(pulls, B, strict=True)) / sum(pulls)


OPTIMUM = sum(a * b for a, b in zip(A, B, strict=True)) / sum(A)


def test_fedavg_stalls_at_its_fixed_point() -> None:
    w, _, path = run_quadratics(FedAvg(), 100)
    assert w == pytest.approx(fedavg_fixed_point(), abs=1e-6)
    assert round(w, 3) == 0.711 and abs(w - OPTIMUM) > 0.03
    want = START
    for found in path[:10]:
        want = sum(b + (1 - LR * a) ** STEPS * (want - b) for a, b in zip(A, B, strict=True)) / 2
        assert found == pytest.approx(want, abs=1e-5), "every round equals the closed form"


@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_scaffold_reaches_the_optimum(variant: str) -> None:
    """With plain SGD both variants take the same step, y − lr (g + c − c_i)."""
    w, controls, _ = run_quadratics(Scaffold(variant), 100)
    assert OPTIMUM == 0.75
    assert w == pytest.approx(0.75, abs=1e-5)
    assert controls == pytest.approx([a * (0.75 - b) for a, b in zip(A, B, strict=True)], abs=1e-4)
    assert controls == pytest.approx([0.75, -0.75], abs=1e-4)


def vectors(num: int, seed: int = 0, size: int = 1000) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g) for _ in range(num)]


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_model_moves_by_the_mean_weighted_by_rows(name: str) -> None:
    x, c, *rest = vectors(8)
    ys, deltas_c = rest[:3], rest[3:]
    rows = [10, 300, 45]
    weighted = sum(n * (y.double() - x.double()) for n, y in zip(rows, ys, strict=True))
    changes = sum(d.double() for d in deltas_c)
    algorithm = build_algorithm(name, "openfedllm")
    control = c if algorithm.has_control else None
    state = algorithm.server_step(
        ServerState(x, control), RoundSums(weighted, 355.0, changes if algorithm.has_control else None, 20)
    )
    want = sum(n * y.double() for n, y in zip(rows, ys, strict=True)) / 355
    assert state.adapter.dtype == torch.float32
    torch.testing.assert_close(state.adapter.double(), want, rtol=1e-6, atol=1e-7)
    if algorithm.has_control:
        assert state.control is not None
        torch.testing.assert_close(state.control.double(), c.double() + changes / 20, rtol=1e-6, atol=1e-7)
    else:
        assert state.control is None


def test_client_control_is_option_two() -> None:
    x, y, c, c_i = vectors(4)
    steps, lr = 25, 3e-5
    got = Scaffold("openfedllm").client_control(x, y, c - c_i, steps, lr)
    want = (x.double() - y.double()) / (steps * lr) - (c - c_i).double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_option_two_under_sgd_is_the_mean_gradient() -> None:
    """y = x − lr Σ (g_k + c − c_i) gives c_i⁺ = mean g_k, whatever c and c_i were."""
    c, c_i, x, *grads = vectors(8)
    y = x.double()
    for g in grads:
        y = y - 0.1 * (g + c - c_i).double()
    got = Scaffold("gradient").client_control(x, y.float(), c - c_i, len(grads), 0.1)
    torch.testing.assert_close(got, torch.stack(grads).mean(0), rtol=1e-4, atol=1e-5)


def test_corrections_act_where_their_variant_says() -> None:
    c, c_i, start = vectors(3)
    for variant, kind in (("gradient", GradientCorrection), ("openfedllm", ValueCorrection)):
        correction = Scaffold(variant).correction(c, c_i)
        assert isinstance(correction, kind)
        grad, values = start.clone(), start.clone()
        correction.on_gradient(grad)
        correction.on_values(values, 0.01)
        want_grad = start + (c - c_i) if variant == "gradient" else start
        want_values = start if variant == "gradient" else start - 0.01 * (c - c_i)
        torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(values, want_values, rtol=1e-6, atol=1e-7)
    assert isinstance(FedAvg().correction(None, None), NoCorrection)


def test_a_new_client_has_a_zero_control_variate() -> None:
    (c,) = vectors(1)
    correction = Scaffold("gradient").correction(c, None)
    grad = torch.zeros_like(c)
    correction.on_gradient(grad)
    assert torch.equal(grad, c)


def test_states_are_not_changed_in_place() -> None:
    x, c, d = vectors(3)
    before = (x.clone(), c.clone())
    Scaffold("gradient").server_step(ServerState(x, c), RoundSums(d.double(), 2.0, d.double(), 5))
    assert torch.equal(x, before[0]) and torch.equal(c, before[1])


def test_small_moves_are_rounded_once() -> None:
    """x + delta is formed in fp64: adding a tenth ulp ten times in one sum is not lost."""
    x = torch.ones(1)
    tenth = torch.tensor([2.0**-23], dtype=torch.float64) * 0.1
    state = FedAvg().server_step(ServerState(x), RoundSums(tenth * 10, 1.0, None, 1))
    assert float(state.adapter) == 1 + 2.0**-23


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"federation\.algorithm='fedprox': must be fedavg or scaffold"):
        build_algorithm("fedprox", "gradient")
    with pytest.raises(ConfigError, match=r"federation\.scaffold_correction='x': must be openfedllm or gradient"):
        build_algorithm("scaffold", "x")
