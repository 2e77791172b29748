"""FedAvg against its closed form on quadratics, and what a server state must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsim.base.errors import CheckpointError
from fedsim.federation import elementwise
from fedsim.federation.algorithms import Correction, FedAvg, RoundSums, ServerState, moved

Vectors = Callable[..., list[torch.Tensor]]


def test_fedavg_stalls_at_its_fixed_point(quadratics: Any) -> None:
    problem = quadratics()
    path = problem.run(FedAvg(), 100).values
    assert path[-1] == pytest.approx(problem.fedavg_fixed_point(), abs=1e-6)
    assert round(path[-1], 3) == 0.711 and abs(path[-1] - problem.optimum) > 0.03
    want = problem.start
    for found in path[:10]:
        want += sum(p * (b - want) for p, b in zip(problem.pulls, problem.b, strict=True)) / 2
        assert found == pytest.approx(want, abs=1e-5), "every round equals the closed form"


def test_clients_count_by_their_weight(quadratics: Any) -> None:
    """A client of weight 0.25 beside one of 1.5 is a client of one row beside one of six."""
    few = quadratics(rows=(0.25, 1.5)).run(FedAvg(), 20).values
    assert few == quadratics(rows=(1.0, 6.0)).run(FedAvg(), 20).values
    assert few != quadratics().run(FedAvg(), 20).values


def test_the_model_moves_by_the_weighted_mean(vectors: Vectors) -> None:
    x, *ys = vectors(4)
    rows = [10, 300, 45]
    weighted = sum(n * (y.double() - x.double()) for n, y in zip(rows, ys, strict=True))
    state = FedAvg().server_step(ServerState(x, num_steps=3), RoundSums(weighted, 355.0, None, 20))
    want = sum(n * y.double() for n, y in zip(rows, ys, strict=True)) / 355
    assert state.adapter.dtype == torch.float32 and not state.vectors and state.num_steps == 4
    torch.testing.assert_close(state.adapter.double(), want, rtol=1e-6, atol=1e-7)


def test_small_moves_are_rounded_once() -> None:
    """x + delta is formed in fp64: adding a tenth ulp ten times in one sum is not lost."""
    x = torch.ones(1)
    tenth = torch.tensor([2.0**-23], dtype=torch.float64) * 0.1
    state = FedAvg().server_step(ServerState(x), RoundSums(tenth * 10, 1.0, None, 1))
    assert float(state.adapter) == 1 + 2.0**-23


@pytest.mark.parametrize("piece", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_move_in_pieces_has_the_bits_of_the_whole_formula(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(elementwise, "PIECE", piece)
    g = torch.Generator().manual_seed(0)
    x, total = torch.randn(29, generator=g), torch.randn(29, generator=g).to(dtype)
    x[:4] = torch.tensor([1e-45, -1e-40, torch.inf, torch.nan])
    total[2:7] = torch.tensor([-torch.inf, 1.0, torch.inf, torch.nan, 3e-45]).to(dtype)
    before = total.clone()
    found = moved(x, total, 1312.0)
    want = (x.double() + total.double() / 1312.0).float()
    assert found.dtype == torch.float32 and torch.equal(found.view(torch.int32), want.view(torch.int32))
    assert torch.equal(total.nan_to_num(7.0), before.nan_to_num(7.0))
    assert moved(x[:0], total[:0], 1.0).shape == (0,)


def test_plain_training_is_not_corrected(vectors: Vectors) -> None:
    (x,) = vectors(1)
    correction = FedAvg().correction(ServerState(x), None)
    assert type(correction) is Correction
    grad, values = x.clone(), x.clone()
    correction.on_loss_gradient(grad, values)
    correction.on_gradient(grad)
    correction.on_values(values, 0.1)
    assert torch.equal(grad, x) and torch.equal(values, x)


def test_a_state_moves_as_one(vectors: Vectors) -> None:
    x, m = vectors(2)
    state = ServerState(x, {"momentum": m}, 7).to(torch.device("meta"))
    assert {v.device.type for v in state.named().values()} == {"meta"} and state.num_steps == 7
    aligned = replace(ServerState(x, {"momentum": m}, 7), adapter=m)
    assert list(aligned.named()) == ["adapter", "momentum"] and aligned.num_steps == 7


@pytest.mark.parametrize(
    ("vectors_of", "message"),
    [
        ({}, "lacks vector momentum"),
        ({"momentum": torch.zeros(5), "control": torch.zeros(5)}, "has an unknown vector control"),
        ({"momentum": torch.zeros(6)}, r"vector momentum is torch\.float32 \[6\], not torch\.float32 \[5\]"),
        ({"momentum": torch.zeros(5, dtype=torch.float64)}, r"vector momentum is torch\.float64 \[5\]"),
        ({"momentum": torch.zeros(1, 5)}, r"vector momentum is torch\.float32 \[1, 5\]"),
    ],
)
def test_a_state_that_does_not_fit_is_named(vectors_of: dict[str, torch.Tensor], message: str) -> None:
    class WithMomentum(FedAvg):
        vector_names = ("momentum",)

    algorithm = WithMomentum()
    algorithm.check(algorithm.start(torch.zeros(5)), 5)
    with pytest.raises(CheckpointError, match=message):
        algorithm.check(ServerState(torch.zeros(5), vectors_of), 5)
    with pytest.raises(CheckpointError, match=r"vector adapter is torch\.float32 \[5\], not torch\.float32 \[4\]"):
        FedAvg().check(ServerState(torch.zeros(5)), 4)
