"""A client's round: its rows, its learning rate, its delta and control variates, whatever ran before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.config import LocalConfig, ServerOptimizerConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import ClientOutcome, FedAvg, RoundSums, ServerState
from fedsim.federation.participation import cosine_by_round, sample_rows
from fedsim.federation.proximal import FedProx
from fedsim.federation.scaffold import CONTROL, Scaffold
from fedsim.federation.server_optimizers import FedAdam, FedAvgM
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.train.client import ClientTrainer, _Task
from fedsim.train.loop import StepSettings, Trainer
from fedsim.train.objectives import SftObjective

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
Rows = Callable[..., list[TokenRow]]
LOCAL = LocalConfig(steps=3, batch_size=4, micro_batch_size=2, lr=1e-3, lr_min=1e-4)


def client_trainer(made: tuple[LoadedModel, FlatAdapter], algorithm: Any, num_steps: int = 3) -> ClientTrainer:
    trainer = Trainer(made[0].base, made[1], StepSettings(2, 1.0, 0.0, 7))
    return ClientTrainer(trainer, algorithm, SftObjective(), LOCAL, num_steps, num_rounds=10, seed=7)


def bits(outcome: ClientOutcome) -> list[Any]:
    vectors = [outcome.delta, outcome.control, outcome.control_delta]
    facts = [outcome.client, outcome.num_rows, outcome.weight, outcome.loss, outcome.first_loss, outcome.num_tokens]
    return [*facts, *(None if v is None else v.tolist() for v in vectors)]


def test_batches_follow_the_clients_own_draws(make_adapted: Make, make_rows: Rows) -> None:
    trainer = client_trainer(make_adapted(), FedAvg())
    rows = make_rows(5)
    batches = trainer.batches(2, rows, 4)
    assert [len(b) for b in batches] == [4, 4, 4]
    drawn = sample_rows(5, 12, 4, 2, 7)
    assert [id(r) for b in batches for r in b] == [id(rows[i]) for i in drawn]
    assert trainer.num_tokens(2, rows, 4) == sum(len(r) for b in batches for r in b)


def test_a_fedavg_client(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    loaded, flat = make_adapted(std=0.1, dropout=0.1)
    state = ServerState(flat.copy())
    rows = make_rows(9)
    outcome = client_trainer((loaded, flat), FedAvg()).train(3, rows, 5, state, None, one_lane())
    assert torch.equal(outcome.delta, flat.values - state.adapter) and outcome.delta.any()
    assert outcome.control is None and outcome.control_delta is None
    assert (outcome.client, outcome.num_rows) == (3, 9)
    assert outcome.num_tokens == client_trainer((loaded, flat), FedAvg()).num_tokens(3, rows, 5)
    largest = float(outcome.delta.abs().max())
    lr = cosine_by_round(5, 10, 1e-3, 1e-4)
    assert 1.5 * lr < largest < 3.1 * lr, "three AdamW steps of the round's learning rate"


def test_a_fedprox_client_stays_nearer(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    """Without a pull it is a FedAvg client bit for bit; with one it ends nearer to where it started."""
    made = make_adapted(std=0.1, dropout=0.1)
    state, rows = ServerState(made[1].copy()), make_rows(9)
    plain, free, held = (
        client_trainer(made, algorithm, num_steps=8).train(3, rows, 5, state, None, one_lane())
        for algorithm in (FedAvg(), FedProx(0.0), FedProx(1e5))
    )
    assert bits(free) == bits(plain)
    assert float(held.delta.norm()) < 0.5 * float(plain.delta.norm())
    assert held.first_loss == plain.first_loss, "the reported loss leaves the term out"


def test_a_client_counts_by_its_rows_weights_or_once(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    made = make_adapted(std=0.1)
    start = made[1].copy()
    rows = [dataclasses.replace(row, weight=w) for row, w in zip(make_rows(4), (1, 0.25, 1, 0.5), strict=True)]
    for algorithm, weight in ((FedAvg(), 2.75), (FedAvgM(ServerOptimizerConfig()), 2.75), (Scaffold("gradient"), 2.75),
                              (FedAdam(ServerOptimizerConfig()), 1.0)):  # fmt: skip
        outcome = client_trainer(made, algorithm, num_steps=1).train(
            0, rows, 0, algorithm.start(start), None, one_lane()
        )
        assert (outcome.num_rows, outcome.weight) == (4, weight)


def test_the_number_of_steps_is_the_participations(make_adapted: Make, make_rows: Rows) -> None:
    trainer = client_trainer(make_adapted(), FedAvg(), num_steps=15)
    assert [len(batch) for batch in trainer.batches(0, make_rows(7), 2)] == [4] * 15


@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_a_clients_result_does_not_depend_on_who_trained_before(
    make_adapted: Make, make_rows: Rows, one_lane: type, variant: str
) -> None:
    made = make_adapted(std=0.1, dropout=0.2)
    size = made[1].size
    g = torch.Generator().manual_seed(0)
    state = ServerState(made[1].copy(), {CONTROL: torch.randn(size, generator=g) * 0.01})
    c_i = torch.randn(size, generator=g) * 0.01
    shards = {client: make_rows(6, seed=client) for client in range(3)}
    trainer = client_trainer(made, Scaffold(variant))

    def outcomes(order: list[int]) -> dict[int, list[Any]]:
        return {c: bits(trainer.train(c, shards[c], 1, state, c_i if c == 1 else None, one_lane())) for c in order}

    first = outcomes([0, 1, 2])
    assert outcomes([2, 1, 0]) == first and outcomes([1]) == {1: first[1]}
    fresh = client_trainer(make_adapted(std=0.1, dropout=0.2), Scaffold(variant))
    assert bits(fresh.train(1, shards[1], 1, state, c_i, one_lane())) == first[1]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_a_scaffold_client(make_adapted: Make, make_rows: Rows, one_lane: type, variant: str, known: bool) -> None:
    """What is summed is c_i⁺ − c_i; c_i = 0 before the client's first round; c_i⁺ is what the variant says."""
    loaded, flat = make_adapted(std=0.1)
    g = torch.Generator().manual_seed(1)
    c, c_i = (torch.randn(flat.size, generator=g) * 0.3 for _ in range(2))
    state = ServerState(flat.copy(), {CONTROL: c})
    rows = make_rows(6)
    outcome = client_trainer((loaded, flat), Scaffold(variant)).train(
        0, rows, 2, state, c_i if known else None, one_lane()
    )
    lr = cosine_by_round(2, 10, 1e-3, 1e-4)
    previous = c_i if known else torch.zeros_like(c_i)
    assert outcome.control is not None and outcome.control_delta is not None
    if variant == "openfedllm":
        want = -outcome.delta.double() / (3 * lr) - (c - previous).double()
        torch.testing.assert_close(outcome.control.double(), want, rtol=1e-3, atol=1e-3)
    else:
        assert 0 < float(outcome.control.norm()) <= 1.0, "a mean of gradients that were clipped to a norm of 1"
    torch.testing.assert_close(outcome.control_delta, outcome.control - previous)
    plain = client_trainer((loaded, flat), FedAvg()).train(0, rows, 2, ServerState(state.adapter), None, one_lane())
    assert not torch.equal(plain.delta, outcome.delta), "the correction was applied"
    if variant == "openfedllm":
        shift = outcome.delta - plain.delta
        drift = -3 * lr * (c - previous)
        assert float((shift - drift).norm() / drift.norm()) < 0.3, (
            "three shifts of lr · (c − c_i), and what they change"
        )
    assert outcome.first_loss == plain.first_loss, "the first loss is the global adapter's"


def test_a_control_variate_is_copied_to_the_adapters_device_once() -> None:
    """It is read for the correction and twice for what the client reports; on a GPU each copy would wait for it."""
    copies: list[torch.device] = []

    class OnHost:
        def to(self, device: torch.device) -> torch.Tensor:
            copies.append(device)
            return torch.ones(3)

    task = _Task(0, [], 0, ServerState(torch.zeros(3)), OnHost(), 1)  # type: ignore[arg-type]
    assert task.control is task.control and copies == [torch.device("cpu")]
    assert _Task(0, [], 0, ServerState(torch.zeros(3)), None, 1).control is None


def test_scaffolds_gradient_variant_corrects_adamw_by_gradients(
    make_adapted: Make, make_rows: Rows, one_lane: type
) -> None:
    """Two clients, four rounds: c − c_i stays of a clipped gradient's size, c_i⁺ is the mean of what was clipped, and
    the loss falls as FedAvg's does."""
    losses = {}
    for name, algorithm in (("fedavg", FedAvg()), ("gradient", Scaffold("gradient"))):
        made = make_adapted(std=0.1)
        trainer = client_trainer(made, algorithm)
        shards = {client: make_rows(6, seed=client) for client in range(2)}
        state, controls = algorithm.start(made[1].copy()), dict.fromkeys(shards)
        path = []
        for round_idx in range(4):
            outcomes = [trainer.train(c, shards[c], round_idx, state, controls[c], one_lane()) for c in shards]
            path.append(sum(o.loss for o in outcomes) / 2)
            deltas, changes = sum(o.delta.double() for o in outcomes), None
            if algorithm.has_control:
                for o in outcomes:
                    assert o.control is not None and float(o.control.norm()) <= 1.0
                    controls[o.client] = o.control
                changes = sum(o.control_delta.double() for o in outcomes)
                assert all(float((state.vectors[CONTROL] - o.control).norm()) < 2.0 for o in outcomes)
            state = algorithm.server_step(state, RoundSums(deltas, 2.0, changes, 2))
        losses[name] = path
    assert losses["gradient"][-1] < losses["gradient"][0] - 0.5 * (losses["fedavg"][0] - losses["fedavg"][-1])
