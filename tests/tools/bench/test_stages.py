"""The stages themselves, on a model of a few thousand weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedsim.base.planner import plan_round
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora
from tools.bench import cai_iteration, local_step, run, wide_lane
from tools.bench.gradients import of_trainer
from tools.bench.models import MICRO
from tools.bench.plain_loop import PeerModel, padded
from tools.bench.stage import PAPER_LORA, Bench, start_vector
from tools.bench.stepwise import runs_in_turns, time_steps

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture()
def bench() -> Bench:
    return Bench(CPU, MICRO, threads=1, repeats=1, budget_s=0.0, say=lambda line: None)


@pytest.mark.parametrize("module", [local_step, cai_iteration])
def test_without_trl_only_the_plain_peer_is_measured(
    module: ModuleType, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "installed", lambda library: False)
    checks = module.STAGE.check(bench)
    assert len(checks) >= 2 and all(check.passed for check in checks)
    rows = module.STAGE.time(bench)
    measured = {row.peer: row.peer_seconds is not None for row in rows}
    assert measured["plain Hugging Face loop"]
    trl = [row for row in rows if row.peer and "TRL" in row.peer]
    assert trl and all(row.peer_seconds is None and row.reached is None for row in trl)
    assert {row.peer_absent for row in trl} == {"not installed"}
    assert all(row.seconds is not None and row.repeats > 0 and row.floor_s and row.floor for row in rows)


@pytest.mark.parametrize(("module", "num_checks"), [(local_step, 6), (cai_iteration, 6)])
def test_trl_does_the_same_work(module: ModuleType, num_checks: int, bench: Bench) -> None:
    checks = module.STAGE.check(bench)
    assert sum("TRL" in check.what for check in checks) == num_checks
    assert all(check.passed for check in checks), checks


def test_a_wrong_loss_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer sees other rows: its losses differ."""
    monkeypatch.setattr(local_step, "installed", lambda library: False)
    right = local_step.plain_loop.sft

    def wrong(peer: PeerModel, batches: list[list[object]], *rest: object, **named: object) -> object:
        return right(peer, [batch[:-1] for batch in batches], *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(local_step.plain_loop, "sft", wrong)
    assert not any(check.passed for check in local_step.STAGE.check(bench))


class HalfBench(Bench):
    """On a CPU with weights in bf16, as on a GPU."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize("module", [local_step, cai_iteration])
def test_in_half_precision_gradients_are_compared_with_fp32(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = HalfBench(CPU, MICRO, threads=1, repeats=1, budget_s=0.0, say=lambda line: None)
    (check,) = module.STAGE.check(half)
    assert check.passed and check.error > 0, check
    monkeypatch.setattr(module, "of_trainer", lambda *given: 1.1 * of_trainer(*given))
    (wrong,) = module.STAGE.check(half)
    assert not wrong.passed, wrong


def test_members_of_a_lane_share_the_batch(bench: Bench, tmp_path: Path) -> None:
    assert run.run([wide_lane.STAGE], bench, tmp_path) == 0
    assert (tmp_path / "wide_lane.json").is_file()


def test_the_projection_is_the_planner_s_where_a_lane_is_as_fast_as_it_has_ranks() -> None:
    tokens = [100, 90, 110, 95, 105]
    plan = plan_round(dict(enumerate(tokens)), [1.0] * 4, 4, wide_lanes=True)
    found = wide_lane.projected(tokens, 0.25)
    assert found.makespan_s == pytest.approx(plan.makespan_s) and found.idle_share == pytest.approx(plan.idle_share)
    equal = wide_lane.projected([100] * 5, 0.33)
    assert equal.makespan_s == pytest.approx(133) and equal.idle_share == pytest.approx(0.0)


def test_the_peer_has_the_same_weights(bench: Bench) -> None:
    model, adapter = bench.adapted()
    peer = PeerModel(bench, adapter.slots)
    peer.load(adapter.values)
    assert torch.equal(peer.vector(), adapter.values)
    mine = dict(model.named_parameters())
    assert all(torch.equal(value, mine[name]) for name, value in peer.model.named_parameters())


def test_b_starts_away_from_zero(bench: Bench) -> None:
    adapter = FlatAdapter(attach_lora(bench.base(), PAPER_LORA))
    vector = start_vector(adapter)
    assert all(float(vector[s.start : s.stop].norm()) > 0 for s in adapter.slots)


def test_padding_is_masked_and_no_target(bench: Bench) -> None:
    rows = local_step.training_rows(3, 64)
    batch = padded(rows, CPU)
    assert batch["attention_mask"].sum().item() == sum(map(len, rows))
    assert (batch["labels"] != -100).sum().item() == sum(row.num_targets for row in rows)


def test_steps_are_counted_from_the_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that takes 3 s to get going, 5 s for its first step and 1 s for each of two more."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(mark: Callable[[], None]) -> None:
        for seconds in (8.0, 1.0, 1.0):
            now[0] += seconds
            mark()

    times = time_steps(work, CPU)
    assert times.steps == [1.0, 1.0] and times.setups == [7.0]


def test_steps_of_two_phases_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(mark: Callable[[], None]) -> None:
        for seconds in (8.0, 1.0, 2.0, 9.0, 30.0, 40.0):
            now[0] += seconds
            mark()

    times = time_steps(work, CPU, phases=2)
    assert times.steps == [31.0, 42.0] and times.setups == [0.0]


def test_runs_take_turns() -> None:
    made: list[str] = []

    def noting(name: str) -> Callable[[int, Callable[[], None]], None]:
        def work(turn: int, mark: Callable[[], None]) -> None:
            made.append(f"{name}{turn}")
            mark()
            mark()

        return work

    runs_in_turns({"a": noting("a"), "b": noting("b")}, CPU, turns=2)
    assert made == ["a0", "b0", "b1", "a1"]
    runs_in_turns({"a": noting("c")}, CPU, turns=5, budget_s=0.0)
    assert made[4:] == ["c0"]


def test_a_run_without_room_on_the_gpu_is_left_out() -> None:
    def full(turn: int, mark: Callable[[], None]) -> None:
        raise torch.cuda.OutOfMemoryError

    def fine(turn: int, mark: Callable[[], None]) -> None:
        mark()
        mark()

    found = runs_in_turns({"full": full, "fine": fine}, CPU, turns=2)
    assert list(found) == ["fine"] and len(found["fine"].steps) == 2


@pytest.mark.deep
def test_neither_fedsim_nor_the_benchmark_needs_trl_deepspeed_datasets_or_wandb() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("trl", "deepspeed", "datasets", "wandb"):
    sys.modules[name] = None  # importing it fails
import pathlib, tempfile, torch
from tools.bench import run
from tools.bench.gradients import of_trainer
from tools.bench.models import MICRO
from tools.bench.stage import Bench
import fedsim.run.simulation, fedsim.generate.engine, fedsim.safety.guard, fedsim.safety.guard_model
bench = Bench(torch.device("cpu"), MICRO, 1, repeats=1, budget_s=0.0)
with tempfile.TemporaryDirectory() as folder:
    sys.exit(run.run([run.load_stage("local_step")], bench, pathlib.Path(folder)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed" in done.stdout
