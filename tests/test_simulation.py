"""The round loop on one process: what a round computes, clients without rows, and runs that cannot go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import load_config
from fedsim.data.world import square_rows
from fedsim.errors import DataError, FedsimError
from fedsim.parallel.world import World
from fedsim.ranks import OneRank
from fedsim.record.metrics import Row, read_rows
from fedsim.simulation import Simulation

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none"]  # fmt: skip
Make = Callable[..., Simulation]


@pytest.fixture()
def make(tmp_path: Path) -> Make:
    """``make(num_red, num_acceptable, *overrides)``: a brief run on a SQuARe file of so many rows."""

    def made(num_red: int, num_acceptable: int, *overrides: str) -> Simulation:
        rows = square_rows()
        red = [row for row in rows if row["acceptable?"] == 0][:num_red]
        acceptable = [row for row in rows if row["acceptable?"] == 1][:num_acceptable]
        path = tmp_path / "square.json"
        path.write_text(json.dumps(red + acceptable), encoding="utf-8")
        places = [f"data.square={path}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
        config = load_config(SMALL, [*BRIEF, *places, *overrides])
        return Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))

    return made


def rows_of(simulation: Simulation, stage: str) -> list[Row]:
    """The metric rows of a stage."""
    return [row for row in read_rows(simulation.record.metrics_file) if row["stage"] == stage]


def final_adapter(simulation: Simulation) -> torch.Tensor:
    """The adapter of the last checkpoint."""
    checkpoint = simulation.record.checkpoints.load(lambda text: None)
    assert checkpoint is not None
    return checkpoint.state.adapter


def watched(simulation: Simulation) -> list[Any]:
    """A list that will hold the federation once the run has assembled it."""
    found: list[Any] = []
    assembled = simulation._assemble

    def assemble(*arguments: Any) -> Any:
        found.append(assembled(*arguments))
        return found[0]

    simulation._assemble = assemble  # type: ignore[method-assign]
    return found


# One row a client, so that a red row is a client whose rows are all filtered.
ONE_ROW_EACH = ["data.federated_rows=6", "data.guard_rows=0", "data.cai_rows=0", "guard.kind=oracle",
                "federation.clients_per_round=6", "federation.num_rounds=2"]  # fmt: skip


def test_a_client_without_rows_sits_out_and_is_counted(make: Make) -> None:
    simulation = make(2, 4, *ONE_ROW_EACH, f"data.federated_red_share={1 / 3}")
    simulation.run()
    (kept,) = rows_of(simulation, "filter")
    assert kept["client/num_kept_rows"] == 4
    assert kept["guard/num_empty_clients"] == 2
    assert kept["guard/recall"] == kept["guard/precision"] == 100.0
    rounds = rows_of(simulation, "round")
    assert len(rounds) == 2
    for row in rounds:
        assert (row["client/num_trained"], row["client/num_sat_out"]) == (4, 2)
        assert row["client/num_rows"] == 4
        assert sum(name.startswith("client/loss_") for name in row) == 4
    assert (simulation.record.folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_round_without_any_client_leaves_the_adapter_as_it_is(make: Make, algorithm: str) -> None:
    overrides = ["data.federated_red_share=1.0", f"federation.algorithm={algorithm}"]
    simulation = make(6, 0, *ONE_ROW_EACH, *overrides)
    federation = watched(simulation)
    simulation.run()
    for row in rows_of(simulation, "round"):
        assert (row["client/num_trained"], row["client/num_sat_out"]) == (0, 6)
    assert torch.equal(final_adapter(simulation), federation[0].start(simulation.config.seed).adapter)
    assert (simulation.record.folder / "summary.md").is_file()


def test_a_round_is_the_row_weighted_mean_of_its_clients(make: Make) -> None:
    """FedAvg by hand: each client of the cohort trained alone from the start, then x + Σ n_i · delta_i / Σ n_i."""
    simulation = make(40, 60, "guard.kind=noisy_oracle", "federation.num_rounds=1")
    found = watched(simulation)
    simulation.run()
    federation = found[0]
    (row,) = rows_of(simulation, "round")
    cohort = sorted(int(name.rpartition("_")[2]) for name in row if name.startswith("client/loss_"))
    assert len(cohort) == 5
    assert len({len(federation.shards[c]) for c in cohort}) > 1  # the weights differ
    start = federation.start(simulation.config.seed)
    lane = simulation.world.everyone()
    outcomes = [federation.cohorts.trainer.train(c, federation.shards[c], 0, start, None, lane) for c in cohort]
    weights = [float(len(federation.shards[c])) for c in cohort]
    mean = sum(w * o.delta.double() for w, o in zip(weights, outcomes, strict=True)) / sum(weights)
    assert float(mean.norm()) > 0.1
    torch.testing.assert_close(final_adapter(simulation).double(), start.adapter.double() + mean, rtol=0, atol=1e-7)
    by_hand = sum(w * o.loss for w, o in zip(weights, outcomes, strict=True)) / sum(weights)
    assert row["client/loss"] == pytest.approx(by_hand, rel=1e-12)


def test_a_guard_that_only_judges_is_looked_for_before_anything_runs(make: Make, tmp_path: Path) -> None:
    simulation = make(30, 40, "eval.guard_judge=untuned", f"guard.path={tmp_path / 'nowhere'}")
    with pytest.raises(FedsimError, match=r"guard\.path=.*nowhere"):
        simulation.run()
    assert not (simulation.record.folder / "manifest.json").exists()


def test_conversations_that_are_all_unusable_are_an_error_with_a_fix(make: Make) -> None:
    simulation = make(30, 40, "data.federated_rows=30", "cai.iterations=1", "cai.max_new_tokens=1")
    with pytest.raises(DataError, match=r"none of the 12 conversations .*raise cai\.max_new_tokens"):
        simulation.run()
