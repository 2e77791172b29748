"""The parts that a configuration puts together: every setting must reach its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import CheckpointError, RunError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.square import SquareRow
from fedsim.federation.algorithms import Algorithm, RoundSums, ServerState
from fedsim.federation.attendance import attend
from fedsim.federation.participation import SampledCohort, sample_cohort
from fedsim.federation.proximal import ProximalTerm
from fedsim.federation.scaffold import CONTROL, Scaffold
from fedsim.parallel.world import World
from fedsim.run.local_rows import tokenise
from fedsim.run.resident import Resident, assemble
from fedsim.train.loop import StepSettings

CPU = torch.device("cpu")
SETTINGS = ["seed=11", "model.lora_r=3", "model.lora_alpha=7", "model.lora_dropout=0.25", "model.dtype=bfloat16",
            "model.lora_targets=[k_proj, o_proj]", "model.attention=eager", "model.max_context=300",
            "local.steps=5", "local.batch_size=6", "local.micro_batch_size=4", "local.max_grad_norm=0.3",
            "local.weight_decay=0.02", "local.lr=0.05", "local.max_length=90", "federation.num_clients=4",
            "federation.clients_per_round=2", "federation.num_rounds=13", "eval.batch_size=9",
            "failures.on_client_error=skip", "failures.straggler_rate=0.5", "parallel.wide_lanes=false"]  # fmt: skip


def row(row_id: int, weight: float = 1.0) -> SquareRow:
    reply = f"Orla flies kite {row_id}. " * (1 + row_id % 3)
    return SquareRow(row_id, f"Who flies kite {row_id}?", reply.strip(), False, (), "kites", weight)


SHARDS = [[row(i) for i in range(client, client + 3)] for client in range(3)] + [[row(9, weight=0.0)]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Callable[..., tuple[Resident, Config]]:
    """``build(*overrides)``: the federation of a configuration whose settings are all unusual, and that."""

    def made(*overrides: str) -> tuple[Resident, Config]:
        config = load_config(None, [f"model.path={llama_dir}", *SETTINGS, *overrides])
        folder = tmp_path_factory.mktemp("assembly")
        return assemble(config, World(OneRank(), CPU, exact=True), SHARDS, folder / "controls"), config

    return made


Build = Callable[..., tuple[Resident, Config]]


@pytest.fixture(scope="module")
def built(build: Build) -> tuple[Resident, Config]:
    return build()


def test_all_parts_work_on_one_model_and_one_adapter(built: tuple[Resident, Config]) -> None:
    federation, _ = built
    base, flat = federation.loaded.base, federation.flat
    assert federation.trainer.model is base and federation.engine.model is base
    assert federation.trainer.adapter is flat and federation.cohorts.trainer.trainer is federation.trainer
    assert federation.chat is federation.loaded.chat is federation.engine.chat
    assert federation.cohorts.trainer.algorithm is federation.algorithm
    assert federation.cohorts.shards is federation.shards and federation.cohorts.controls is federation.controls


def test_the_model_is_loaded_as_configured(built: tuple[Resident, Config]) -> None:
    federation, _ = built
    lora = federation.loaded.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (3, 7, 0.25)
    assert set(lora.target_modules) == {"k_proj", "o_proj"}
    assert federation.loaded.base.dtype == torch.bfloat16
    assert federation.loaded.base.config._attn_implementation == IMPLEMENTATIONS["eager"]


def test_steps_and_replies_are_as_configured(built: tuple[Resident, Config]) -> None:
    federation, config = built
    assert federation.trainer.settings == StepSettings(4, 0.3, 0.02, 11)
    engine, clients, cohorts = federation.engine, federation.cohorts.trainer, federation.cohorts
    assert (engine.batch_size, engine.max_context, engine.seed) == (9, 300, 11)
    assert engine.ranks is cohorts.world.ranks
    assert (clients.local, clients.num_steps, clients.num_rounds, clients.seed) == (config.local, 5, 13, 11)
    assert (cohorts.failures, cohorts.wide_lanes, cohorts.num_micro_batches) == (config.failures, False, 2)
    assert federation.participation == SampledCohort(4, 2, 11)


def test_the_context_is_no_longer_than_the_model_s(build: Build) -> None:
    assert build("model.max_context=4000")[0].engine.max_context == 512


def test_rows_are_questions_and_answers_with_their_weights(built: tuple[Resident, Config]) -> None:
    federation, _ = built
    chat = federation.chat
    assert [len(shard) for shard in federation.shards] == [3, 3, 3, 0], "a row that weighs nothing is left out"
    for rows, tokens in zip(SHARDS[:3], federation.shards[:3], strict=True):
        for given, made in zip(rows, tokens, strict=True):
            assert made.weight == given.weight and len(made) <= 90
            trained = chat.decode(made.input_ids[made.loss_mask])
            assert given.response.startswith(trained) and (trained == given.response) != made.truncated
            assert given.prompt in chat.decode(made.input_ids[~made.loss_mask])
    assert {made.truncated for tokens in federation.shards for made in tokens} == {True, False}
    assert tokenise(chat, row(1), 999).truncated is False


@pytest.mark.parametrize(
    ("override", "name"),
    [("algorithm=scaffold", "Scaffold"), ("algorithm=fedadam", "FedAdam"), ("algorithm=fedprox", "FedProx")],
)
def test_the_algorithm_is_the_one_that_is_named(build: Build, override: str, name: str) -> None:
    federation, config = build(f"federation.{override}", "federation.prox_mu=3.5", "server_optimizer.lr=0.125")
    assert type(federation.algorithm).__name__ == name
    if name == "FedProx":
        correction = federation.algorithm.correction(federation.start(0), None)
        assert isinstance(correction, ProximalTerm) and correction.mu == 3.5
    if name == "FedAdam":
        state = federation.start(0)
        sums = RoundSums(torch.ones_like(state.adapter).double(), 1.0, None, 4)
        assert not torch.equal(federation.step(state, sums).adapter, state.adapter)
        assert config.server_optimizer.lr == 0.125


def test_rows_in_one_place_get_a_cohort_s_budget(build: Build) -> None:
    whole = ["failures.on_client_error=stop", "failures.straggler_rate=0"]  # one trainer must not fail or be late
    federation, _ = build("federation.algorithm=centralised", *whole)
    assert [len(shard) for shard in federation.shards] == [9]
    assert federation.cohorts.trainer.num_steps == 5 * 2


def test_a_run_starts_from_an_adapter_that_its_seed_draws(built: tuple[Resident, Config]) -> None:
    federation, _ = built
    starts = [federation.start(seed) for seed in (11, 12)]
    assert torch.equal(starts[0].adapter, federation.flat.initial(11)) and starts[0].num_steps == 0
    assert not torch.equal(starts[0].adapter, starts[1].adapter)


def test_a_state_is_moved_to_the_adapter_s_device() -> None:
    flat: Any = SimpleNamespace(values=torch.zeros(3, device="meta"))
    federation = Resident(None, flat, *[None] * 7)  # type: ignore[arg-type]
    moved = federation.to_device(ServerState(torch.zeros(3), {CONTROL: torch.zeros(3)}, 2))
    assert {vector.device.type for vector in moved.named().values()} == {"meta"} and moved.num_steps == 2


def test_who_trains_is_drawn_for_the_round_among_those_with_rows(built: tuple[Resident, Config]) -> None:
    """Client 3 has rows that weigh nothing; stragglers are drawn with the run's seed and settings."""
    federation, config = built
    seen = set()
    for round_idx in range(6):
        drawn = sample_cohort(4, 2, round_idx, 11)
        able = [client for client in drawn if client != 3]
        found = federation.attendance(round_idx)
        assert found == attend(drawn, able, 5, round_idx, 11, config.failures)
        assert list(found.sat_out) == [client for client in drawn if client == 3]
        seen |= {len(found.stragglers), len(found.sat_out)}
    assert seen == {0, 1, 2} or seen == {0, 1}


def test_a_state_of_another_shape_is_refused(built: tuple[Resident, Config]) -> None:
    federation, _ = built
    federation.check(federation.start(0))
    with pytest.raises(CheckpointError, match="adapter"):
        federation.check(ServerState(torch.zeros(federation.flat.size + 1)))
    with pytest.raises(CheckpointError, match="control"):
        federation.check(replace(federation.start(0), vectors={CONTROL: torch.zeros(federation.flat.size)}))


@pytest.mark.parametrize("name", ["adapter", "control"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_server_step_that_is_not_finite_names_the_vector(name: str, value: float) -> None:
    algorithm: Algorithm = Scaffold("gradient")
    parts: Any = [SimpleNamespace()] * 4
    parts[1] = SimpleNamespace(size=3)
    federation = Resident(*parts, algorithm, *parts[:4])
    state = algorithm.start(torch.zeros(3))
    sums = {"adapter": torch.ones(3).double(), "control": torch.ones(3).double()}
    assert federation.step(state, RoundSums(sums["adapter"], 2.0, sums["control"], 4)).num_steps == 1
    sums[name][1] = value
    with pytest.raises(RunError, match=rf"the server's vector {name} became NaN or infinite in step 1; lower"):
        federation.step(state, RoundSums(sums["adapter"], 2.0, sums["control"], 4))
