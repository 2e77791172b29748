"""A client that fails in its training: alone or on a wide lane, it leaves nothing behind and nobody waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.base.errors import CheckpointError, ClientError, NotFiniteError
from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import ClientOutcome, FedAvg
from fedsim.federation.participation import cosine_by_round
from fedsim.federation.scaffold import CONTROL, Scaffold
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.train.client import ClientTrainer
from fedsim.train.containment import ContainErrors
from fedsim.train.loop import StepSettings, Trainer
from fedsim.train.objectives import SftObjective

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
Rows = Callable[..., list[TokenRow]]
LOCAL = LocalConfig(steps=4, batch_size=4, micro_batch_size=2, lr=1e-3, lr_min=1e-4)


def client_trainer(made: tuple[LoadedModel, FlatAdapter], algorithm: Any) -> ClientTrainer:
    trainer = Trainer(made[0].base, made[1], StepSettings(2, 1.0, 0.0, 7))
    return ClientTrainer(trainer, algorithm, SftObjective(), LOCAL, 4, num_rounds=10, seed=7)


def beyond(row: TokenRow) -> TokenRow:
    """A row with a token that the model does not have: the forward pass raises an IndexError."""
    return dataclasses.replace(row, input_ids=np.full_like(row.input_ids, 10_000))


def without_number(row: TokenRow) -> TokenRow:
    """A row whose loss is NaN."""
    return dataclasses.replace(row, weight=float("nan"))


SPOILT = {"raised": beyond, "not finite": without_number}


def bits(outcome: ClientOutcome) -> list[Any]:
    vectors = [outcome.delta, outcome.control, outcome.control_delta]
    facts = [outcome.weight, outcome.loss, outcome.first_loss, outcome.num_tokens]
    return [*facts, *(None if v is None else v.tolist() for v in vectors)]


def failure(run: Callable[[], object]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("reason", SPOILT)
@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_a_failed_client_changes_no_bit_of_the_next(
    make_adapted: Make, make_rows: Rows, one_lane: type, variant: str, reason: str
) -> None:
    made = make_adapted(std=0.1, dropout=0.2)
    algorithm = Scaffold(variant)
    state, good, bad = algorithm.start(made[1].copy()), make_rows(6), make_rows(6, seed=1)
    bad[3] = SPOILT[reason](bad[3])
    untouched = client_trainer(make_adapted(std=0.1, dropout=0.2), algorithm)
    want = bits(untouched.train(1, good, 0, state, None, one_lane(), errors=ContainErrors()))
    trainer = client_trainer(made, algorithm)
    seen: list[int] = []
    error = failure(
        lambda: trainer.train(0, bad, 0, state, None, one_lane(), lambda d, _: seen.append(d), errors=ContainErrors())
    )
    assert error.reason == reason
    assert len(seen) == 4 if reason == "not finite" else len(seen) < 4, (
        "what raises ends a client that is alone at once"
    )
    assert ("IndexError" in str(error), "Traceback" in error.trace) == ((reason == "raised",) * 2)
    assert not made[0].base.training, "the model is left as it was"
    assert bits(trainer.train(1, good, 0, state, None, one_lane(), errors=ContainErrors())) == want


def test_an_error_that_is_not_contained_leaves_as_it_is(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    made, rows = make_adapted(std=0.1), make_rows(6)
    trainer, state = client_trainer(made, FedAvg()), FedAvg().start(made[1].copy())
    with pytest.raises(IndexError):
        trainer.train(0, [beyond(row) for row in rows], 0, state, None, one_lane())
    assert not made[0].base.training
    with pytest.raises(NotFiniteError, match=r"client 0, round 3: the loss or gradient became NaN .* in step 1 of 4"):
        trainer.train(0, [without_number(row) for row in rows], 2, state, None, one_lane())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("when", ["in a step", "before the first", "after the last"])
def test_one_member_that_raises_leaves_no_other_waiting(
    make_adapted: Make, make_rows: Rows, on_members: Callable[..., list[Any]], exact: bool, when: str
) -> None:
    """The members of a lane of three (two micro-batches a step): one raises, all end, and a good client follows."""
    made = [make_adapted(std=0.1) for _ in range(3)]
    state, rows = FedAvg().start(made[0][1].copy()), make_rows(8)
    spoilt = [*rows[:3], beyond(rows[3]), *rows[4:]]

    def member(lane: Any) -> tuple[str, bool, list[Any]]:
        trainer, errors = client_trainer(made[lane.index], FedAvg()), ContainErrors()

        def raises(*_: Any) -> Any:
            raise CheckpointError("a damaged file")

        if when == "before the first" and lane.index == 1:
            errors.run(raises)
        if when == "after the last" and lane.index == 1:
            trainer._outcome = raises  # type: ignore[method-assign]
        try:
            trainer.train(0, spoilt if when == "in a step" else rows, 0, state, None, lane, errors=errors)
            told = ""
        except ClientError as error:
            told = error.reason
        trainer.__dict__.pop("_outcome", None)
        after = trainer.train(1, rows, 0, state, None, lane, errors=ContainErrors())
        return told, made[lane.index][0].base.training, bits(after)

    found = on_members(3, member, exact=exact)
    told = [reason for reason, _, _ in found]
    if when == "in a step":  # the row comes twice, in micro-batches of one member or two
        assert "raised" in told and set(told) == {"raised", "not finite"}
    else:
        other = "" if when == "after the last" else "not finite"
        assert told == [other, "raised", other]
    assert not any(training for _, training, _ in found)
    assert found[0][2] == found[1][2] == found[2][2]
    clean = client_trainer(make_adapted(std=0.1), FedAvg())
    (want,) = on_members(1, lambda lane: bits(clean.train(1, rows, 0, state, None, lane)), exact=exact)
    assert found[0][2] == want or not exact


@pytest.mark.parametrize("variant", ["gradient", "openfedllm"])
def test_a_straggler_takes_the_first_steps_and_its_control_counts_them(
    make_adapted: Make, make_rows: Rows, one_lane: type, variant: str
) -> None:
    """Two of four steps: the rows are the usual first ones, and c_i⁺ = (x − y)/(2 · lr) − (c − c_i), or a mean."""
    made, rows, algorithm = make_adapted(std=0.1), make_rows(9), Scaffold(variant)
    trainer = client_trainer(made, algorithm)
    assert trainer.batches(3, rows, 1, 2) == trainer.batches(3, rows, 1)[:2]
    c = torch.randn(made[1].size, generator=torch.Generator().manual_seed(0)) * 0.01
    state = dataclasses.replace(algorithm.start(made[1].copy()), vectors={CONTROL: c})
    gradients: list[torch.Tensor] = []

    class Watched(algorithm.correction(state, None).__class__):  # type: ignore[misc, name-defined]
        def on_gradient(self, grad: torch.Tensor) -> None:
            gradients.append(grad.clone())
            super().on_gradient(grad)

    algorithm._correct = Watched
    outcome = trainer.train(3, rows, 1, state, None, one_lane(), num_steps=2)
    assert len(gradients) == 2 and outcome.control is not None
    assert outcome.num_tokens == sum(len(row) for batch in trainer.batches(3, rows, 1)[:2] for row in batch)
    assert outcome.num_tokens == trainer.num_tokens(3, rows, 1, 2)
    lr = cosine_by_round(1, 10, 1e-3, 1e-4)
    mean = (gradients[0].double() + gradients[1].double()) / 2
    want = mean if variant == "gradient" else -outcome.delta.double() / (2 * lr) - c.double()
    torch.testing.assert_close(outcome.control.double(), want, rtol=1e-3, atol=2e-4)
    short = client_trainer(make_adapted(std=0.1), Scaffold(variant))
    short.num_steps = 2
    assert bits(short.train(3, rows, 1, state, None, one_lane())) == bits(outcome)
