"""Server optimizers against the papers' formulas, torch's own optimizers, OpenFedLLM's arithmetic and closed forms."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import FedAvg, RoundSums, ServerState, build_algorithm
from fedsim.federation.server_optimizers import ServerOptimizer

NAMES = ("fedavgm", "fedadagrad", "fedyogi", "fedadam")
ADAPTIVE = NAMES[1:]
VARIANTS = ("reddi", "openfedllm")
Vectors = Callable[..., list[torch.Tensor]]


def built(name: str, variant: str, **keys: float) -> ServerOptimizer:
    algorithm = build_algorithm(FederationConfig(algorithm=name), ServerOptimizerConfig(variant=variant, **keys))  # type: ignore[arg-type]
    assert isinstance(algorithm, ServerOptimizer)
    return algorithm


def run(algorithm: Any, start: torch.Tensor, deltas: list[torch.Tensor], weight: float = 1.0) -> list[ServerState]:
    """The state after each round, whose mean delta is given."""
    states = [algorithm.start(start)]
    for delta in deltas:
        states.append(algorithm.server_step(states[-1], RoundSums(weight * delta.double(), weight, None, 20)))
    return states[1:]


def as_published(
    name: str, start: np.ndarray, deltas: list[np.ndarray], lr: float, beta1: float, beta2: float, tau: float
) -> list[np.ndarray]:
    """Reddi et al. 2021, algorithm 2, line by line in float64; for fedavgm Hsu et al. 2019."""
    x, m = start.astype(np.float64), np.zeros_like(start, dtype=np.float64)
    v = np.full_like(m, tau * tau)
    path = []
    for delta in deltas:
        if name == "fedavgm":
            m = beta1 * m + delta
            x = x + lr * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            squares = delta * delta
            if name == "fedadagrad":
                v = v + squares
            elif name == "fedyogi":
                v = v - (1 - beta2) * squares * np.sign(v - squares)
            else:
                v = beta2 * v + (1 - beta2) * squares
            x = x + lr * m / (np.sqrt(v) + tau)
        path.append(x)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_the_reddi_variant_is_algorithm_2(vectors: Vectors, name: str, scale: float) -> None:
    start, *deltas = vectors(9)
    deltas = [scale * d for d in deltas]
    keys = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "tau": 2e-3}
    states = run(built(name, "reddi", **keys), start, deltas)
    want = as_published(name, start.numpy(), [d.double().numpy() for d in deltas], **keys)
    for state, x in zip(states, want, strict=True):
        np.testing.assert_allclose(state.adapter.double().numpy(), x, rtol=3e-6, atol=3e-6)
    moves = np.abs(want[-1] - start.double().numpy())
    assert np.median(moves) > 1e-5, "the tolerance tells a step from none"


def openfedllm_rounds(
    name: str, start: dict[str, torch.Tensor], rounds: list[list[dict[str, torch.Tensor]]], rows: list[int],
    lr: float, beta1: float, beta2: float, tau: float,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The arithmetic of OpenFedLLM's ``get_proxy_dict`` and ``global_aggregate``, on one dict of tensors a client."""
    x = {key: value.clone() for key, value in start.items()}
    m = {key: torch.zeros_like(value) for key, value in start.items()}
    v = {key: torch.full_like(value, tau**2) for key, value in start.items()}
    shares = [n / sum(rows) if name == "fedavgm" else 1 / len(rows) for n in rows]
    for round_idx, clients in enumerate(rounds):
        for key in x:
            delta = sum(s * (y[key] - x[key]) for s, y in zip(shares, clients, strict=True))
            keeps = 0.0 if name == "fedadagrad" or round_idx == 0 else beta1
            m[key] = keeps * m[key] + (1 - keeps) * delta
            if name == "fedavgm":
                x[key] = x[key] + m[key]
                continue
            squares = m[key].square()
            if name == "fedadagrad":
                v[key] = v[key] + squares
            elif name == "fedyogi":
                v[key] = v[key] - (1 - beta2) * squares * (v[key] - squares).sign()
            else:
                v[key] = beta2 * v[key] + (1 - beta2) * squares
            x[key] = x[key] + lr * m[key] / (v[key].sqrt() + tau)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_the_openfedllm_variant_is_its_arithmetic(vectors: Vectors, name: str) -> None:
    """Clients of very unequal sizes on two tensors; ours on one flat vector, with weights as the algorithm says."""
    rows, keys = [1, 40, 7], {"lr": 0.02, "beta1": 0.85, "beta2": 0.9, "tau": 3e-3}
    start = dict(zip(("lora_A", "lora_B"), (v.double() for v in vectors(2, size=60)), strict=True))
    moves = iter(vectors(100, seed=1, size=60))
    rounds, x = [], {key: value.clone() for key, value in start.items()}
    for _ in range(6):  # clients start from the reference's own global model
        rounds.append([{key: x[key] + 0.05 * next(moves).double() for key in x} for _ in rows])
        x = openfedllm_rounds(name, start, rounds, rows, **keys)
    algorithm = built(name, "openfedllm", **keys)
    state = algorithm.start(torch.cat(list(start.values())).float())
    weights = [algorithm.client_weight(float(n)) for n in rows]
    for clients in rounds:
        ys = [torch.cat(list(client.values())) for client in clients]
        weighted = sum(w * (y - state.adapter.double()) for w, y in zip(weights, ys, strict=True))
        assert isinstance(weighted, torch.Tensor)
        state = algorithm.server_step(state, RoundSums(weighted, sum(weights), None, 20))
    want = torch.cat(list(x.values()))
    torch.testing.assert_close(state.adapter.double(), want, rtol=1e-5, atol=2e-6)
    assert float((want - torch.cat(list(start.values()))).abs().median()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_two_variants_differ(vectors: Vectors, name: str) -> None:
    start, *deltas = vectors(4)
    one, two = (run(built(name, variant), start, [0.01 * d for d in deltas])[-1] for variant in VARIANTS)
    assert float((one.adapter - two.adapter).abs().max()) > 1e-4


def torch_path(
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    start: torch.Tensor,
    deltas: list[torch.Tensor],
    before: Callable[[torch.optim.Optimizer, int], None] = lambda made, t: None,
) -> torch.Tensor:
    """Where a torch optimizer arrives whose gradients are −Δ, in float64; ``before`` is called before step t ≥ 1."""
    parameter = torch.nn.Parameter(start.double())
    made = optimizer([parameter])
    for t, delta in enumerate(deltas, start=1):
        parameter.grad = -delta.double()
        before(made, t)
        made.step()
    return parameter.detach()


def test_fedadagrad_without_momentum_is_torchs_adagrad(vectors: Vectors) -> None:
    start, *deltas = vectors(7)
    want = torch_path(lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.02**2, eps=0.02), start,
                      deltas)  # fmt: skip
    for variant, beta1 in (("reddi", 0.0), ("openfedllm", 0.9)):
        got = run(built("fedadagrad", variant, lr=0.1, tau=0.02, beta1=beta1), start, deltas)[-1].adapter
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_fedadam_is_torchs_adam_without_its_bias_correction(vectors: Vectors) -> None:
    """Adam divides m by 1 − β1^t and √v by √(1 − β2^t); lr and eps of each step are chosen to take both back."""
    start, *deltas = vectors(7)
    lr, beta1, beta2, tau = 0.05, 0.9, 0.99, 1e-2

    def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.Adam(parameters, betas=(beta1, beta2))
        zero = torch.zeros_like(parameters[0])
        made.state[parameters[0]] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero + tau**2}
        return made

    def uncorrect(made: torch.optim.Optimizer, t: int) -> None:
        root = math.sqrt(1 - beta2**t)
        made.param_groups[0].update(lr=lr * (1 - beta1**t) / root, eps=tau / root)

    want = torch_path(adam, start, deltas, uncorrect)
    got = run(built("fedadam", "reddi", lr=lr, beta1=beta1, beta2=beta2, tau=tau), start, deltas)[-1].adapter
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("variant", "lr", "dampening"), [("reddi", 0.3, 0.0), ("openfedllm", 1.0, 0.8)])
def test_fedavgm_is_torchs_sgd(vectors: Vectors, variant: str, lr: float, dampening: float) -> None:
    """torch's first momentum buffer is the gradient, undamped, as OpenFedLLM's is Δ."""
    start, *deltas = vectors(7)
    want = torch_path(lambda p: torch.optim.SGD(p, lr=lr, momentum=0.8, dampening=dampening), start, deltas)
    got = run(built("fedavgm", variant, lr=0.3, beta1=0.8), start, deltas)[-1].adapter
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fedavgm_on_quadratics_is_a_heavy_ball(quadratics: Any, variant: str) -> None:
    """The mean delta is −P (x − x*), so e = x − x* follows e⁺ = (1 + β − s P) e − β e⁻: two geometric sequences.

    s is lr as published and 1 − β in OpenFedLLM; e_1 = (1 − lr P) e_0, there (1 − P) e_0.
    """
    problem, beta, lr = quadratics(), 0.7, 0.6
    fixed = problem.fedavg_fixed_point()
    pull = sum(problem.pulls) / 2
    s, first = (lr, lr) if variant == "reddi" else (1 - beta, 1.0)
    e0 = problem.start - fixed
    e1 = (1 - first * pull) * e0
    middle = 1 + beta - s * pull
    root = cmath.sqrt(middle**2 - 4 * beta)
    z1, z2 = (middle + root) / 2, (middle - root) / 2
    c1 = (e1 - e0 * z2) / (z1 - z2)
    path = problem.run(built("fedavgm", variant, lr=lr, beta1=beta), 60).values
    want = [(c1 * z1**t + (e0 - c1) * z2**t).real + fixed for t in range(1, 61)]
    assert path == pytest.approx(want, abs=2e-5)
    assert min(path) < fixed - 0.05, "the ball overshoots"


def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(vectors: Vectors) -> None:
    start, *deltas = vectors(6)
    plain = run(FedAvg(), start, deltas, weight=3.0)
    for algorithm in (built("fedavgm", "reddi", lr=1.0, beta1=0.0), built("fedavgm", "openfedllm", beta1=0.0)):
        for one, two in zip(run(algorithm, start, deltas, weight=3.0), plain, strict=True):
            assert torch.equal(one.adapter, two.adapter)
        assert algorithm.client_weight(37.5) == FedAvg().client_weight(37.5) == 37.5


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adaptive_servers_count_each_client_once(quadratics: Any, name: str, variant: str) -> None:
    algorithm = built(name, variant, lr=0.05)
    assert algorithm.client_weight(0.25) == algorithm.client_weight(900.0) == 1.0
    uneven, even = (quadratics(rows=rows).run(algorithm, 10).values for rows in ((1.0, 50.0), (1.0, 1.0)))
    assert uneven == even


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_states_start_and_go_on_as_they_should(vectors: Vectors, name: str, variant: str) -> None:
    x, *deltas = vectors(3)
    algorithm = built(name, variant, tau=0.01)
    start = algorithm.start(x)
    assert not start.vectors["momentum"].any() and start.num_steps == 0
    if name in ADAPTIVE:
        assert torch.equal(start.vectors["second_moment"], torch.full_like(x, 1e-4))
    copies = {key: vector.clone() for key, vector in start.named().items()}
    states = run(algorithm, x, deltas)
    assert all(torch.equal(vector, copies[key]) for key, vector in start.named().items()), "nothing changes in place"
    for t, state in enumerate(states, start=1):
        algorithm.check(state, x.numel())
        assert state.num_steps == t
    places = [vector.data_ptr() for state in states for vector in state.named().values()]
    assert len(set(places)) == len(places), "vectors do not share memory"


@st.composite
def paths(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, float]]:
    """A start, deltas of all sizes with zeros among them, and settings."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, num = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    values = rng.standard_normal((num + 1, size)) * 10.0 ** rng.uniform(-9, 3, (num + 1, size))
    values[rng.random((num + 1, size)) < 0.2] = 0.0
    start, *deltas = torch.from_numpy(values.astype(np.float32))
    unit = st.floats(0, 0.999)
    keys = {"lr": draw(st.floats(1e-4, 10)), "beta1": draw(unit), "beta2": draw(unit), "tau": draw(st.floats(1e-4, 1))}
    return start, deltas, keys


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(path=paths())
def test_adaptive_steps_are_bounded(
    name: str, variant: str, path: tuple[torch.Tensor, list[torch.Tensor], dict[str, float]]
) -> None:
    """v ≥ 0, Adagrad's never falls, Yogi's moves by at most (1 − β2) of the squares, and steps are bounded.

    |m| ≤ max |Δ| and √v + τ ≥ τ; where v holds this round's m², a step is at most lr / √(1 − β2), Adagrad's lr.
    """
    start, deltas, keys = path
    algorithm = built(name, variant, **keys)
    before = algorithm.start(start)
    largest = torch.zeros_like(start, dtype=torch.float64)
    for delta in deltas:
        after = run_once(algorithm, before, delta)
        largest = torch.maximum(largest, delta.double().abs())
        v, w = before.vectors["second_moment"].double(), after.vectors["second_moment"].double()
        momentum = after.vectors["momentum"].double()
        squares = (delta.double() if variant == "reddi" else momentum) ** 2
        assert (w >= 0).all() and (momentum.abs() <= largest * (1 + 1e-5)).all()
        slack = 1e-6 * (v + squares)
        if name == "fedadagrad":
            assert (w >= v).all()
        if name == "fedyogi":
            assert ((w - v).abs() <= (1 - keys["beta2"]) * squares + slack).all()
        rounding = 1e-6 * (before.adapter.double().abs() + after.adapter.double().abs())
        step = (after.adapter.double() - before.adapter.double()).abs()
        assert (step <= keys["lr"] * largest / keys["tau"] * (1 + 1e-5) + rounding).all()
        if variant == "openfedllm" and name != "fedyogi":
            share = 1.0 if name == "fedadagrad" else 1 - keys["beta2"]
            assert (step <= keys["lr"] / math.sqrt(share) * (1 + 1e-5) + rounding).all()
        before = after


def run_once(algorithm: Any, state: ServerState, delta: torch.Tensor) -> ServerState:
    """One server step whose mean delta is given."""
    return algorithm.server_step(state, RoundSums(delta.double(), 1.0, None, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(path=paths(), shift=st.integers(0, 19), weight=st.sampled_from([0.25, 2.0, 64.0]))
def test_coordinates_are_independent_and_only_the_mean_counts(
    name: str, variant: str, path: tuple[torch.Tensor, list[torch.Tensor], dict[str, float]], shift: int, weight: float
) -> None:
    """Rotated vectors give the rotated state bit for bit; so do sums whose weights are all 2^k times as large."""
    start, deltas, keys = path
    algorithm = built(name, variant, **keys)
    plain = run(algorithm, start, deltas)[-1].named()
    turned = run(algorithm, start.roll(shift), [d.roll(shift) for d in deltas], weight)[-1].named()
    assert all(torch.equal(vector.roll(shift), turned[key]) for key, vector in plain.items())
