"""Lanes: a batch that several ranks share is the same step, and a client's place in the plan changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.artefacts import file_digest
from fedsim.config import load_config
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import TokenRow, assistant_turn, user_turn
from fedsim.data.square import load_square
from fedsim.federation.participation import sample_cohort
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import load_model
from fedsim.parallel.world import process_world
from fedsim.run.resident import assemble
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import DpoObjective, Preference, SftObjective

SMALL = Path(__file__).parent / "small.yaml"
BATCH_SIZES = [7, 5, 1, 8]  # 4, 3, 1 and 4 micro-batches of two rows: some ranks of a wide lane have none


def train_on_lane(kind: str, dropout: float, exact: bool) -> dict[str, Any]:
    """Four steps on a lane of the whole world, from an adapter that is not zero."""
    with process_world(exact=exact, threads=1, timeout_s=60, device="cpu") as world:
        lora = LoraSettings(4, 8.0, dropout, ("q_proj", "v_proj"))
        loaded = load_model("embedded", lora, dtype="float32", attention="sdpa", device=world.device)
        flat = FlatAdapter(loaded.model)
        flat.load(flat.initial(0) + 0.01 * torch.sin(torch.arange(flat.size, dtype=torch.float32)))

        def row(i: int, reply: str) -> TokenRow:
            return loaded.chat.training_row([user_turn(f"May I fly kite {i}?"), assistant_turn(reply)], 200)

        rows = [row(i, "Yes, do it. " * (1 + i % 3)) for i in range(sum(BATCH_SIZES))]
        pairs = [Preference(row, replace(other)) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
        items: list[Any] = list(rows) if kind == "sft" else list(pairs)
        starts = [sum(BATCH_SIZES[:i]) for i in range(len(BATCH_SIZES))]
        batches = [items[start : start + size] for start, size in zip(starts, BATCH_SIZES, strict=True)]
        objective: Any = SftObjective() if kind == "sft" else DpoObjective(flat, flat.copy(), 0.1)
        trainer = Trainer(loaded.base, flat, StepSettings(2, 1.0, 0.0, seed=3))
        stats = trainer.run(TrainingPlan(batches, lambda t: 1e-2, ("test",)), objective, world.everyone())
        return {
            "adapter": flat.copy().numpy().tobytes(),
            "losses": stats.losses,
            "stats": stats.stats,
            "num_tokens": stats.num_tokens,
        }


@pytest.mark.parametrize(("kind", "dropout"), [("sft", 0.0), ("sft", 0.3), ("dpo", 0.3)])
def test_a_wide_lane_takes_the_same_steps_as_one_rank(pool: Any, kind: str, dropout: float) -> None:
    results = pool.run_all([(width, train_on_lane, kind, dropout, True) for width in (1, 2, 3, 4)])
    single = results[0][0]
    assert all(result == single for ranks in results for result in ranks)
    assert len(set(single["losses"])) == len(BATCH_SIZES)


def test_dropout_is_drawn_in_the_lane(pool: Any) -> None:
    plain, dropped = pool.run_all([(1, train_on_lane, "sft", rate, True) for rate in (0.0, 0.3)])
    assert plain[0]["losses"] != dropped[0]["losses"]


def deterministic_mode() -> tuple[bool, bool]:
    """Whether kernels are deterministic, and whether new memory is filled, which costs each mask a second write."""
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu"):
        new = torch.empty(4).isnan().all()
        return torch.are_deterministic_algorithms_enabled(), bool(new)


def test_exact_mode_fills_no_memory(pool: Any) -> None:
    assert pool.run_all([(2, deterministic_mode)]) == [[(True, False)] * 2]


def train_cohorts(
    folder: str, square_file: str, overrides: list[str], costs: list[float], wide_lanes: bool
) -> dict[str, Any]:
    """Two rounds of SCAFFOLD's local training and server step on ranks whose believed costs are given."""
    words = [*overrides, f"parallel.wide_lanes={str(wide_lanes).lower()}", "federation.algorithm=scaffold"]
    config = load_config(SMALL, words)
    rows = load_square(Path(square_file)).rows
    shards = [rows[client * 9 : client * 9 + 5 + client % 4] for client in range(config.federation.num_clients)]
    widths: list[int] = []
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu") as world:
        federation = assemble(config, world, shards, Path(folder, "client_state"))
        state = federation.start(config.seed)
        believed = [costs[rank % len(costs)] for rank in range(world.size)]
        for round_idx in range(2):
            cohort = sample_cohort(len(shards), config.federation.clients_per_round, round_idx, config.seed)
            steps = dict.fromkeys(cohort, config.local.steps)
            work = federation.cohorts.train(steps, round_idx, state, believed)
            result = federation.cohorts.reduce(work, state, believed)
            state = federation.algorithm.server_step(state, result.aggregated.sums)
            federation.controls.advance(cohort, round_idx)
            widths.extend(job.width for job in work.plan.jobs)
        world.ranks.gather(None)
        return {
            "adapter": state.adapter.numpy().tobytes(),
            "control": state.vectors["control"].numpy().tobytes(),
            "client_state": {p.name: file_digest(p) for p in sorted(Path(folder, "client_state").iterdir())},
            "losses": [c.loss for c in result.aggregated.clients],
            "widths": widths,
        }


@pytest.mark.parametrize("correction", ["openfedllm", pytest.param("gradient", marks=pytest.mark.deep)])
def test_placement_changes_no_bit(pool: Any, square_file: Path, tmp_path: Path, correction: str) -> None:
    """Wide lanes or none, equal or very unequal ranks: adapter, control variates and losses are the same."""
    overrides = [f"federation.scaffold_correction={correction}"]
    cases = [
        (1, [1.0], True),
        (2, [1.0], True),
        (3, [1.0], True),
        (4, [1.0], True),
        (4, [1.0], False),
        (4, [1.0, 50.0, 2.0], True),
        (3, [9.0, 1.0], False),
    ]
    jobs = [
        (size, train_cohorts, str(tmp_path / str(i)), str(square_file), overrides, costs, wide)
        for i, (size, costs, wide) in enumerate(cases)
    ]
    results = pool.run_all(jobs)
    decided = [{k: v for k, v in rank.items() if k != "widths"} for ranks in results for rank in ranks]
    assert all(result == decided[0] for result in decided)
    assert len(decided[0]["client_state"]) == 10  # five clients in each of two rounds
    widths = [set(ranks[0]["widths"]) for ranks in results]
    assert all(w == {1} for w, (_, _, wide) in zip(widths, cases, strict=True) if not wide)
    assert all(max(w) > 1 for w in widths[1:4])  # five clients on 2, 3 and 4 ranks: the last ones share
