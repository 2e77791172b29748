"""The round loop over parts that record what they are handed: each stage must start from the result of the one before.

The adapter has three numbers: how often it was trained, how often it was aligned, and the run's seed. A result that is
lost, or that of an earlier stage, is therefore a wrong number in the next stage's record.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.base.errors import CheckpointError, ConfigError, RunError, Stopped
from fedsim.base.planner import Plan
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config, to_nested
from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally
from fedsim.evaluate.suite import Suite
from fedsim.federation.algorithms import RoundSums, ServerState, build_algorithm
from fedsim.federation.client_state import ClientStateStore
from fedsim.federation.failures import ClientFailure
from fedsim.federation.participation import cosine_by_round
from fedsim.federation.scaffold import CONTROL
from fedsim.model.cost import ModelCost
from fedsim.parallel.world import World
from fedsim.record.manifest import write_manifest
from fedsim.record.metrics import Row, read_rows
from fedsim.record.run_record import RunRecord
from fedsim.report import finish
from fedsim.run import checks, simulation
from fedsim.run.aggregate import Aggregated, ClientReport
from fedsim.run.cohort import CohortResult, agreed_checksums
from fedsim.run.local_rows import LocalRows
from fedsim.run.measurement import Measurement
from fedsim.run.peak import Peak
from fedsim.run.preparation import Guarded, Inputs
from fedsim.run.resident import Resident
from fedsim.run.simulation import Simulation
from fedsim.safety.alignment import Alignment

SEED = 7
NUM_ROUNDS = 6
ENGINE = SimpleNamespace(spare_bytes=0)
NUM_CLIENTS = 4
HAS_CAI = (1, 3, 5)
NO_ROWS, NO_UPDATE = 3, 4  # rounds: the only client that is drawn has no rows; every client fails
BASE = [f"seed={SEED}", f"federation.num_rounds={NUM_ROUNDS}", f"federation.num_clients={NUM_CLIENTS}",
        "federation.clients_per_round=2", "eval.every=3", "local.steps=9", "local.lr=0.5", "local.lr_min=0.1",
        "failures.on_client_error=skip", "failures.min_clients=0", "guard.kind=none", "cai.constitution=tiny",
        "wandb.mode=off"]  # fmt: skip


def adapter(trained: int, aligned: int) -> torch.Tensor:
    return torch.tensor([float(trained), float(aligned), float(SEED)])


def history(vector: torch.Tensor) -> tuple[int, int]:
    """Number of trainings and of alignments of an adapter."""
    assert vector.dtype == torch.float32 and vector[2] == SEED
    return int(vector[0]), int(vector[1])


class Log(list[tuple[Any, ...]]):
    """Events in the order in which they happened."""

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [event for event in self if event[0] in names]


@dataclass
class Flat:
    log: Log
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    size: int = 3

    def initial(self, seed: int) -> torch.Tensor:
        return torch.tensor([0.0, 0.0, float(seed)])

    def save(self, folder: Path, vector: torch.Tensor) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(vector.numpy().tobytes())
        self.log.append(("saved", folder.name, history(vector)))


class Drawn:
    """A draw of clients 0 and 2; in round ``NO_ROWS`` of client 1, which has no rows."""

    def drawn(self, round_idx: int) -> list[int]:
        return [1] if round_idx == NO_ROWS else [0, 2]


class Cohorts:
    """Cohorts whose every round adds 1 to the adapter's first number.

    Attributes:
        gain: that number; 0 for clients that learn nothing.
    """

    gain = 1.0
    attacks: tuple[()] = ()

    def __init__(self, log: Log, config: Config, controls: ClientStateStore) -> None:
        self.log = log
        self.failures = config.failures
        self.controls = controls
        self.trainer = SimpleNamespace(num_steps=config.local.steps, seed=config.seed)

    def train(
        self, steps: Mapping[int, int], round_idx: int, state: ServerState, cost: Sequence[float], on_step: Any
    ) -> str:
        self.log.append(("train", round_idx, history(state.adapter), dict(steps), tuple(cost), state.num_steps))
        on_step(1, 2)
        for client in steps:
            self.controls.save(client, round_idx, torch.full((3,), 1.0 + round_idx))
        self.steps = steps
        return f"work of round {round_idx}"

    def reduce(self, work: str, state: ServerState, cost: Sequence[float]) -> CohortResult:
        round_idx = int(work.rpartition(" ")[2])
        failed = list(self.steps) if round_idx == NO_UPDATE else []
        delivered = [client for client in self.steps if client not in failed]
        self.log.append(("reduce", work, history(state.adapter), tuple(cost)))
        # Two clients of 1 and 3 rows: each delta is 1 in the first number.
        reports = [ClientReport(c, 1 + c, 1.0 + c, 10.0 * c + round_idx, 5.0 + c, 100) for c in delivered]
        weight = sum(report.weight for report in reports)
        control = torch.full((3,), float(NUM_CLIENTS), dtype=torch.float64)
        sums = RoundSums(
            torch.tensor([self.gain * weight, 0.0, 0.0], dtype=torch.float64), weight, control, NUM_CLIENTS
        )
        failures = [ClientFailure(client, "raised", 0, "it rains") for client in failed]
        plan = Plan((), 0.25, 0.125)
        return CohortResult(Aggregated(sums, reports, [2.0], [200.0]), failures, plan, (round_idx + 2.0,), [4.0])


class ToyAligner:
    def __init__(self, log: Log, lane_size: int) -> None:
        self.log = log
        self.lane_size = lane_size

    def is_due(self, round_idx: int) -> bool:
        return round_idx in HAS_CAI

    def align(self, vector: torch.Tensor, round_idx: int, lane: Any, on_step: Callable[[int, int], None]) -> Alignment:
        assert lane.size == self.lane_size
        self.log.append(("align", round_idx, history(vector)))
        on_step(2, 2)
        return Alignment(vector + torch.tensor([0.0, 1.0, 0.0]), {"cai/sft_loss": 20.0 + round_idx})


class ToyResident(Resident):
    """A federation that records which states are moved to the device."""

    def to_device(self, state: ServerState) -> ServerState:
        self.flat.log.append(("to device", history(state.adapter)))  # type: ignore[attr-defined]
        return super().to_device(state)


class ToyMeter:
    def __init__(self, log: Log) -> None:
        self.log = log

    def begin(self) -> None:
        self.log.append(("begin",))

    def trained(self, cohorts: Any, steps: Mapping[int, int], round_idx: int, result: CohortResult) -> None:
        self.log.append(("metered", "train", round_idx, dict(steps), result.delivered))

    def aligned(self, aligner: Any, round_idx: int) -> None:
        self.log.append(("metered", "cai", round_idx))

    def generated(self, phase: str, engine: Any) -> None:
        self.log.append(("metered", phase, engine))

    def pop(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        return {"perf/seconds_of": ", ".join(sorted(seconds))}


class ToyMeasurement(Measurement):
    """A measurement with the real schedule that only records the adapter and the point."""

    log: Log

    def take(self, round_idx: int, point: str, vector: torch.Tensor) -> None:
        self.log.append(("measure", round_idx, point, history(vector)))
        self.record.append(round_idx, "eval", {"point": point})


class ToyPreparation:
    """A preparation whose results are recognisable stand-ins."""

    def __init__(self, log: Log, lane_size: int, record: RunRecord) -> None:
        self.log = log
        self.cai = ToyAligner(log, lane_size)
        self.record = record
        self.guarded: Any = Guarded(SimpleNamespace(shards="kept shards"), {}, "judge")  # type: ignore[arg-type]
        self.inputs: Any = Inputs("data", Suite(limit=3), {})  # type: ignore[arg-type]

    def read(self) -> Inputs:
        with self.record.phase("data", "data"):
            return self.inputs

    def write_manifest(self, inputs: Inputs, shapes: Any) -> None:
        assert inputs is self.inputs and set(shapes) == {"model"}
        self.log.append(("manifest",))
        write_manifest(self.record.folder, to_nested(self.record.config), {}, {}, {}, num_ranks=1)
        self.record.write_config()

    def check_rows(self, data: Any) -> None:
        assert data is self.inputs.data
        self.log.append(("rows checked",))

    def try_models(self, roles: Any) -> None:
        self.log.append(("models tried", list(roles)))

    def filter(self, data: Any) -> Guarded:
        assert data is self.inputs.data
        return self.guarded

    def record_filter(self, guarded: Guarded, federation: Resident) -> None:
        assert guarded is self.guarded and federation.shards
        self.log.append(("filter recorded",))

    def shared_evaluation(self, inputs: Inputs, federation: Resident) -> str:
        assert inputs is self.inputs and federation.shards
        return "shared"

    def check_unchanged(self, inputs: Inputs) -> None:
        raise CheckpointError("the kites changed")

    def aligner(self, data: Any, federation: Resident, guard: Any, *, new: bool) -> ToyAligner:
        assert data is self.inputs.data and federation.shards and guard is self.guarded.judge
        self.log.append(("conversations", new))
        return self.cai


class Toy(Simulation):
    """A simulation over these parts.

    Attributes:
        log: what happened.
        said: lines of progress.
        after: called when a round is over.
    """

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        self.log = Log()
        self.said: list[str] = []
        self.preparation: Any = ToyPreparation(self.log, world.size, self.record)
        self.record.say = self.said.append  # type: ignore[method-assign]
        self.after: Callable[[int], object] = lambda round_idx: None
        save, counts = self.record.checkpoints.save, self.record.counts
        self.record.checkpoints.save = lambda made: self._noted("checkpoint", made.round_idx, save, made)  # type: ignore
        self.record.counts = lambda round_idx: self._noted("counts", round_idx, counts, round_idx)  # type: ignore
        self.world.stop.mark_done = lambda: self.log.append(("mark_done",))  # type: ignore[method-assign]

    def _noted(self, name: str, round_idx: int, act: Callable[..., None], given: Any) -> None:
        act(given)
        self.log.append((name, round_idx))

    def _assemble(self, filtered: Any) -> Resident:
        assert filtered.shards == "kept shards"
        row = SimpleNamespace(weight=1.0)
        shards: Any = [[row], [], [row] * 3, [row]]
        controls = ClientStateStore(self.record.client_state)
        algorithm = build_algorithm(self.config.federation, self.config.server_optimizer)
        parts: list[Any] = [
            SimpleNamespace(),
            Flat(self.log),
            None,
            ENGINE,
            algorithm,
            Drawn(),
            LocalRows(shards, Tally(), 0),
        ]
        self.meter: Any = ToyMeter(self.log)
        self.federation = ToyResident(*parts, controls, Cohorts(self.log, self.config, controls))  # type: ignore
        return self.federation

    def _measurement(self, federation: Resident, suite: Suite, shared: Any) -> Measurement:
        made = super()._measurement(federation, suite, shared)
        assert (made.resident, made.suite, made.shared) == (federation, suite, "shared")
        assert (made.meter, made.record, made.config) == (self.meter, self.record, self.config)
        assert suite == Suite(limit=3, guard="judge")  # type: ignore[arg-type]
        found = ToyMeasurement(self.config, self.world, self.record, federation, suite, self.meter)
        found.log = self.log
        return found

    def _round(self, federation: Resident, round_idx: int, *rest: Any) -> Any:
        self.log.append(("round", round_idx))
        return super()._round(federation, round_idx, *rest)

    def _stop_if_asked(self, num_done: int) -> None:
        self.after(num_done - 1)
        super()._stop_if_asked(num_done)

    def rows(self, stage: str) -> list[Row]:
        return [row for row in read_rows(self.record.metrics_file) if row["stage"] == stage]

    def checkpoint(self, round_idx: int) -> Any:
        return self.record.checkpoints.read(round_idx)


Make = Callable[..., Toy]


def toy(folder: Path, *overrides: str, ranks: Any = None) -> Toy:
    """A run that keeps everything in ``folder``."""
    places = [f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}", "record.keep_checkpoints=9"]
    config = load_config(None, [*BASE, *places, *overrides])
    return Toy(config, World(ranks or OneRank(), torch.device("cpu"), exact=True))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots, which are slow and read by no test here."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])


@pytest.fixture()
def make(tmp_path: Path) -> Make:
    """``make(*overrides, ranks=OneRank())``: a run in the test's folder."""
    return partial(toy, tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run of FedAvg from the first round to the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "write_plots", lambda *_: [])
        run = toy(tmp_path_factory.mktemp("fedavg"))
        run.run()
    return run


@pytest.fixture(scope="module")
def scaffold(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run of SCAFFOLD from the first round to the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "write_plots", lambda *_: [])
        run = toy(tmp_path_factory.mktemp("scaffold"), "federation.algorithm=scaffold")
        run.run()
    return run


STAGES = [
    ("measure", -1, "pretrained", (0, 0)),
    ("round", 0),
    ("train", 0, (0, 0), {0: 9, 2: 9}, (1e-4,), 0),
    ("reduce", "work of round 0", (0, 0), (1e-4,)),
    ("round", 1),
    ("train", 1, (1, 0), {0: 9, 2: 9}, (2.0,), 1),
    ("reduce", "work of round 1", (1, 0), (2.0,)),
    ("align", 1, (2, 0)),
    ("round", 2),
    ("train", 2, (2, 1), {0: 9, 2: 9}, (3.0,), 2),
    ("reduce", "work of round 2", (2, 1), (3.0,)),
    ("measure", 2, "global", (3, 1)),
    ("round", NO_ROWS),
    ("align", 3, (3, 1)),
    ("round", NO_UPDATE),
    ("train", 4, (3, 2), {0: 9, 2: 9}, (4.0,), 3),
    ("reduce", "work of round 4", (3, 2), (4.0,)),
    ("round", 5),
    ("train", 5, (3, 2), {0: 9, 2: 9}, (6.0,), 3),
    ("reduce", "work of round 5", (3, 2), (6.0,)),
    ("measure", 5, "before_cai", (4, 2)),
    ("align", 5, (4, 2)),
    ("measure", 5, "after_cai", (4, 3)),
    ("saved", "adapter", (4, 3)),
]
"""Every stage of a run and the adapter that it must be handed."""

AFTER = [(1, 0), (2, 1), (3, 1), (3, 2), (3, 2), (4, 3)]
"""The adapter that each round must end with."""

COSTS = [(2.0,), (3.0,), (4.0,), (4.0,), (6.0,), (7.0,)]


def stages(run: Toy) -> list[tuple[Any, ...]]:
    return run.log.of("round", "train", "reduce", "align", "measure", "saved")


def test_each_stage_is_handed_what_the_one_before_gave(done: Toy) -> None:
    run = done
    assert stages(run) == STAGES
    for round_idx, want in enumerate(AFTER):
        after = run.checkpoint(round_idx)
        assert (after.round_idx, history(after.state.adapter)) == (round_idx, want)
        assert after.seconds_per_token == COSTS[round_idx] and after.client_rounds == {}
        assert after.state.num_steps == want[0], "a round without an update is no step of the server"


def test_without_cai_the_aggregate_is_the_global_adapter(make: Make) -> None:
    run = make()
    run.preparation.aligner = lambda data, federation, guard, new: None
    run.run()
    assert run.log.of("align") == []
    points = [(-1, "pretrained", (0, 0)), (2, "global", (3, 0)), (5, "global", (4, 0))]
    assert run.log.of("measure") == [("measure", *point) for point in points]
    assert history(run.checkpoint(5).state.adapter) == (4, 0)


def test_a_round_s_row_has_the_figures_of_all_its_stages(done: Toy) -> None:
    run = done
    rows = run.rows("round")
    assert len(rows) == NUM_ROUNDS
    for round_idx, row in enumerate(rows):
        is_trained, has_update = round_idx != NO_ROWS, round_idx not in (NO_ROWS, NO_UPDATE)
        assert row["client/num_trained"] == (2 if has_update else 0)
        assert row["client/num_sat_out"] == (0 if is_trained else 1)
        assert ("client/lr" in row) == ("client/num_failed" in row) == ("parallel/idle_share" in row) == is_trained
        if is_trained:
            assert row["client/lr"] == cosine_by_round(round_idx, NUM_ROUNDS, 0.5, 0.1)
            assert row["client/num_failed"] == (0 if has_update else 2)
            assert (row["parallel/planned_makespan_s"], row["parallel/makespan_s"]) == (0.25, 4.0)
        if has_update:
            assert row["client/loss"] == (round_idx * 1 + (20.0 + round_idx) * 3) / 4
        assert row.get("cai/sft_loss") == (20.0 + round_idx if round_idx in HAS_CAI else None)
        checksums = agreed_checksums(run.checkpoint(round_idx).state, OneRank())
        assert row["global/checksum"] == checksums["adapter"], "the checkpoint's, after CAI"
        timed = {"train", "aggregate"} if is_trained else set()
        timed |= {"cai"} if round_idx in HAS_CAI else set()
        assert {name for name in row if name.startswith("time/")} == {f"time/{name}_s" for name in timed}
        assert row["perf/seconds_of"] == ", ".join(sorted(f"time/{name}_s" for name in timed))
    assert run.said.count("no client delivered an update: the global adapter stays as it is") == 2
    assert [line for line in run.said if "failed" in line] == [
        f"client {client} failed (raised) on rank 0: it rains" for client in (0, 2)
    ]


def test_the_meter_is_given_every_stage(done: Toy) -> None:
    run = done
    assert run.log.of("metered", "begin") == [
        ("metered", "cai_generate", ENGINE),
        ("begin",), ("metered", "train", 0, {0: 9, 2: 9}, [0, 2]),
        ("begin",), ("metered", "train", 1, {0: 9, 2: 9}, [0, 2]), ("metered", "cai", 1),
        ("begin",), ("metered", "train", 2, {0: 9, 2: 9}, [0, 2]),
        ("begin",), ("metered", "cai", 3),
        ("begin",), ("metered", "train", 4, {0: 9, 2: 9}, []),
        ("begin",), ("metered", "train", 5, {0: 9, 2: 9}, [0, 2]), ("metered", "cai", 5),
    ]  # fmt: skip
    assert run.log.index(("begin",)) < run.log.index(STAGES[2]), "a round's time begins before its training"


def test_preparation_comes_first_and_is_recorded_once(done: Toy) -> None:
    run = done
    names = [event[0] for event in run.log]
    first = ["rows checked", "manifest", "models tried", "filter recorded", "measure", "conversations"]
    assert names[: len(first)] == first and run.log.of("models tried") == [("models tried", [])]
    assert run.log.of("conversations") == [("conversations", True)]
    (prepared,) = run.rows("prepare")
    assert prepared["round"] == 0 and not run.rows("resume")
    assert prepared["time/data_s"] >= 0 and prepared["perf/seconds_of"] == "time/data_s"
    assert not any("resumed" in line for line in run.said)
    ending = json.loads((run.record.folder / "exit.json").read_text(encoding="utf-8"))
    assert ending["reason"] == "finished" and run.log[-2:] == [("saved", "adapter", (4, 3)), ("mark_done",)]
    assert (run.record.folder / "summary.md").is_file()
    assert run.log.of("to device") == [("to device", (0, 0))]


def test_a_round_counts_once_its_checkpoint_is_on_disk(done: Toy) -> None:
    assert done.log.of("checkpoint", "counts") == [
        (name, round_idx) for round_idx in range(NUM_ROUNDS) for name in ("checkpoint", "counts")
    ]


@pytest.mark.parametrize("stopped_after", [0, 2, NO_UPDATE])
def test_a_resumed_run_goes_on_from_the_checkpoint(make: Make, scaffold: Toy, stopped_after: int) -> None:
    first = make("federation.algorithm=scaffold")

    def ask(round_idx: int) -> None:
        if round_idx == stopped_after:
            first.world.stop.signal = signal.SIGTERM

    first.after = ask
    message = f"SIGTERM came; {stopped_after + 1} of {NUM_ROUNDS} rounds are done"
    with pytest.raises(Stopped, match=message):
        first.run()
    assert first.log[-1] == ("mark_done",)
    again = make("federation.algorithm=scaffold")
    again.run()
    rest = STAGES.index(("round", stopped_after + 1))
    assert stages(first) + stages(again) == STAGES and stages(again) == STAGES[rest:]
    assert again.log.of("conversations", "filter recorded") == [("conversations", False)]
    assert f"resumed after round {stopped_after + 1}/{NUM_ROUNDS}" in again.said
    (resumed,) = again.rows("resume")
    assert (resumed["round"], len(again.rows("prepare"))) == (stopped_after + 1, 1)
    assert again.log.of("to device") == [("to device", AFTER[stopped_after])] and "time/data_s" in resumed
    for round_idx in range(NUM_ROUNDS):
        want, found = scaffold.checkpoint(round_idx), again.checkpoint(round_idx)
        assert found.state.num_steps == want.state.num_steps and found.client_rounds == want.client_rounds
        for name, vector in want.state.named().items():
            assert torch.equal(found.state.named()[name], vector), name
    keep = ("stage", "round", "client/num_trained", "cai/sft_loss", "global/checksum", "global/control_checksum")
    found, want = ([{k: r.get(k) for k in keep} for r in run.rows("round")] for run in (again, scaffold))
    assert found == want


def test_control_variates_advance_with_the_clients_that_delivered(scaffold: Toy) -> None:
    run = scaffold
    newest = [0, 1, 2, 2, 2, 5]  # a round without an update moves no variate
    for round_idx, last in enumerate(newest):
        after = run.checkpoint(round_idx)
        assert after.client_rounds == {0: last, 2: last}
        assert after.state.vectors[CONTROL].tolist() == [float(AFTER[round_idx][0])] * 3
    kept = {path.name for path in run.record.client_state.iterdir()}
    assert kept == {f"client{c:06d}-round{r + 1:06d}.safetensors" for c in (0, 2) for r in set(newest)}
    checksums = [row["global/control_checksum"] for row in run.rows("round")]
    assert len(set(checksums)) == 4 and checksums[2] == checksums[3] == checksums[4]
    assert all(row["global/checksum"] != row["global/control_checksum"] for row in run.rows("round"))


def test_control_variates_of_dropped_checkpoints_go(make: Make) -> None:
    run = make("federation.algorithm=scaffold", "record.keep_checkpoints=1")
    run.run()
    assert {path.name for path in run.record.client_state.iterdir()} == {
        f"client{client:06d}-round000006.safetensors" for client in (0, 2)
    }


def test_a_finished_run_trains_nothing_and_keeps_its_record(make: Make) -> None:
    make().run()
    again = make()
    before = again.record.metrics_file.read_bytes()
    again.run()
    assert stages(again) == [("saved", "adapter", (4, 3))]
    assert again.record.metrics_file.read_bytes() == before
    assert [line for line in again.said if line.startswith("this run is finished: all 6 rounds are in ")]


def test_a_finished_run_without_checkpoints_is_left_as_it_is(make: Make) -> None:
    run = make("federation.num_rounds=1")
    run.run()
    shutil.rmtree(run.record.checkpoints.folder)
    again = make("federation.num_rounds=1")
    again.run()
    assert again.log == [("mark_done",)] and again.said[-1].startswith("this run is finished: all 1 rounds are in ")


def test_a_run_without_any_update_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "drawn", lambda self, round_idx: [1])
    run = make("federation.num_rounds=2")
    with pytest.raises(RunError, match=r"no client delivered an update in any of the 2 round\(s\)"):
        run.run()
    assert run.log.of("saved") == [] and history(run.checkpoint(1).state.adapter) == (0, 1)


def test_a_run_that_learns_nothing_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cohorts, "gain", 0.0)
    run = make("federation.num_rounds=1")
    with pytest.raises(RunError, match=r"bit for bit the one before the first of 1 round\(s\): nothing was learned"):
        run.run()
    assert run.log.of("saved") == []


def test_what_ranks_cost_is_forgotten_where_their_number_has_changed(make: Make) -> None:
    run = make("federation.num_rounds=6")
    run.run()
    last = run.checkpoint(4)
    run.record.checkpoints.save(replace(last, seconds_per_token=(1.0, 2.0)))
    again = make()
    again.run()
    assert again.log.of("train") == [("train", 5, (3, 2), {0: 9, 2: 9}, (1e-4,), 3)]


def test_a_state_that_is_not_the_federation_s_is_passed_over(make: Make) -> None:
    run = make()
    run.run()
    last = run.checkpoint(5)
    run.record.checkpoints.save(replace(last, state=ServerState(torch.zeros(2))))
    again = make()
    again.run()
    assert again.log.of("round") == [("round", 5)] and history(again.checkpoint(5).state.adapter) == (4, 3)


def test_what_is_shown(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The header, the attention, a warning, a round's loss; lines after the rounds carry no round."""
    monkeypatch.setattr(checks, "free_memory", lambda device, num_ranks: 4_000_000)
    run = make("federation.num_rounds=1")
    run.run()
    run.record.progress.note("all is over")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(": run demo") and lines[-1].endswith("] all is over")
    (aggregated,) = [line for line in lines if "round 1/1 · aggregation" in line]
    assert aggregated.endswith("loss 15")
    assert len([line for line in run.said if line.startswith("attention of the model: ")]) == 1
    assert [line for line in run.said if line.startswith("warning: ")]


def test_a_check_refuses_the_directory_of_another_run(make: Make) -> None:
    make("federation.num_rounds=1").run()
    with pytest.raises(ConfigError, match=r"local\.batch_size was 16, is 8"):
        make("federation.num_rounds=1", "local.batch_size=8").check()


def test_a_check_looks_at_the_files_of_a_run_that_would_be_resumed(make: Make) -> None:
    with pytest.raises(CheckpointError, match="the kites changed"):
        make().check()


def test_the_federation_has_the_filter_s_rows_and_its_model_is_metered(
    tmp_path: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real assembly: peaks are those of the model's number type."""
    asked: list[Any] = []
    monkeypatch.setattr(simulation, "run_peak", lambda *given: asked.append(given) or Peak(1.0, 1.0, "", 0.0))
    config = load_config(None, [*BASE, f"record.dir={tmp_path}", f"model.path={llama_dir}", "model.dtype=bfloat16"])
    run = Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))
    rows = [SquareRow(0, "Who flies?", "Orla flies.", False, (), "kites")]
    federation = run._assemble(SimpleNamespace(shards=[rows, [], rows * 2, []]))  # type: ignore[arg-type]
    assert [len(shard) for shard in federation.shards] == [1, 0, 2, 0]
    assert federation.controls.folder == run.record.client_state
    assert asked == [(run.ranks, run.world.device, torch.bfloat16)]
    assert run.meter.cost == ModelCost.of(federation.loaded.base) and run.meter.world is run.world


class Pair(OneRank):
    """Two processes with equal values."""

    size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


class PairWorld(World):
    """A world whose lanes have no process groups."""

    def lane(self, first_rank: int, width: int) -> Any:
        return SimpleNamespace(index=0, size=width, summer=None)


def test_all_ranks_share_cai(make: Make) -> None:
    """CAI runs on a lane of all ranks (:class:`ToyAligner` checks its size)."""
    config = make("federation.num_rounds=2").config
    run = Toy(config, PairWorld(Pair(), torch.device("cpu"), exact=True))
    run.run()
    assert run.log.of("align") == [("align", 1, (2, 0))]
    assert [event[4] for event in run.log.of("train")] == [(1e-4, 1e-4)] * 2, "what one rank cost is not two ranks'"


def test_artefacts_may_lie_in_the_user_s_home(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make("record.artefacts=~/kites").store.folder == tmp_path / "kites"


class Asked(OneRank):
    """Two ranks, of which only the other one was asked to stop."""

    def gather(self, value: Any) -> list[Any]:
        return [value, int(signal.SIGINT)] if isinstance(value, int) else [value]


def test_any_rank_that_is_asked_stops_all(make: Make) -> None:
    with pytest.raises(Stopped, match=r"SIGINT came; 1 of 6 rounds are done") as caught:
        make(ranks=Asked()).run()
    assert caught.value.args[0].endswith("the same command goes on from there")


def test_a_wish_to_stop_in_the_last_round_ends_a_run_that_is_finished(make: Make) -> None:
    run = make("federation.num_rounds=1", ranks=Asked())
    run.run()
    assert stages(run)[-1] == ("saved", "adapter", (1, 0))
