"""The contract: adapters, control variates, texts and metrics are bit-identical on 1 to 4 processes and after a stop.

Every run has its own artefact directory, so that guard fine-tuning, verdicts and CAI conversations are computed anew on
each number of processes; the artefacts are compared too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.errors import RunError
from fedsim.base.processes import family, kill
from fedsim.config import load_config
from fedsim.evaluate.own import DESCRIBED
from fedsim.parallel.world import process_world
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.metrics import read_rows
from fedsim.report import finish
from fedsim.run import cohort
from fedsim.run.metrics_page import STAGES, documented
from fedsim.run.simulation import Simulation
from tests.distributed.golden import RECORD, digests, platform, record, recorded
from tools.chaos.outcome import different, outcome

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"

# Together: both algorithms and corrections, dropout on and off, cohorts of 5 and 3 that leave ranks over.
FEDAVG = ["federation.algorithm=fedavg", "federation.num_rounds=2", "eval.every=0", "guard.action=downweight",
          "guard.red_weight=0.3"]  # fmt: skip
SCAFFOLD = [
    "federation.algorithm=scaffold",
    "federation.scaffold_correction=openfedllm",
    "federation.clients_per_round=3",
    "model.lora_dropout=0.0",
    "guard.lora_dropout=0.0",
]
GRADIENT = [
    "federation.algorithm=scaffold",
    "federation.scaffold_correction=gradient",
    "federation.num_rounds=2",
    "guard.kind=noisy_oracle",
    "cai.iterations=0",
    "eval.every=0",
    "eval.mt_bench=''",
]

# Only the clients' training and the server's step, for the other algorithms.
BRIEF = [
    "federation.num_rounds=2",
    "guard.kind=none",
    "cai.iterations=0",
    "eval.every=0",
    "eval.limit=1",
    "eval.advbench=",
    "eval.mt_bench=",
]
FEDPROX = ["federation.algorithm=fedprox", "federation.prox_mu=5.0", *BRIEF]
FEDADAM = ["federation.algorithm=fedadam", "server_optimizer.lr=0.01", *BRIEF]
CENTRALISED = ["federation.algorithm=centralised", *BRIEF]
# Of 60 rows, 11 have a prompt that leaves room; one of the six clients holds none of them.
DROPPED = [*BRIEF, "local.max_length=20", "federation.num_rounds=3"]


class Stopped(Exception):
    """The interruption that a test injects."""


def simulate(overrides: list[str], stop: tuple[str, int] | None) -> list[int]:
    """One whole run; returns the width of each lane that trained a client.

    Args:
        overrides: of the small configuration.
        stop: ("after" | "before", round): raise on rank 0 right after or before the checkpoint of this round.
    """
    config = load_config(SMALL, overrides)
    widths: list[int] = []
    plan_round = cohort.plan_round

    def planned(*arguments: Any, **named: Any) -> Any:
        plan = plan_round(*arguments, **named)
        widths.extend(job.width for job in plan.jobs)
        return plan

    cohort.plan_round = planned
    finish.write_plots = lambda *_: []  # slow, and drawn from the metrics that are compared
    try:
        with process_world(exact=config.parallel.exact, threads=1, timeout_s=60, device="cpu") as world:
            simulation = Simulation(config, world)
            save = simulation.record.checkpoints.save

            def stopping(checkpoint: Checkpoint) -> None:
                if stop is None or checkpoint.round_idx != stop[1]:
                    save(checkpoint)
                    return
                if stop[0] == "after":
                    save(checkpoint)
                raise Stopped

            simulation.record.checkpoints.save = stopping  # type: ignore[method-assign]
            simulation.run()
    except (RunError, SystemExit, Stopped):
        if stop is None:
            raise
    finally:
        cohort.plan_round = plan_round
    return widths


def places(folder: Path, square_file: Path) -> list[str]:
    """Overrides that give a run its own directories."""
    return [f"data.square={square_file}", f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}"]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Compare part by part, so that a failure names the first stage that differs."""
    assert (parts := different(found, wanted)) == [], f"{what}: {parts[0]} differ"


@pytest.fixture(scope="module")
def straight(
    pool: Any, square_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], dict[int, dict[str, Any]]]:
    """Outcomes of uninterrupted runs of a configuration by number of processes; each is run once."""
    known: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}

    def run(overrides: list[str], sizes: tuple[int, ...] = (1, 3, 2, 4)) -> dict[int, dict[str, Any]]:
        key = tuple(overrides)
        if key not in known:
            folders = {size: tmp_path_factory.mktemp(f"straight{size}") for size in sizes}
            jobs = [(n, simulate, [*overrides, *places(f, square_file)], None) for n, f in folders.items()]
            widths = dict(zip(folders, pool.run_all(jobs), strict=True))
            known[key] = {n: outcome(f / "small", f / "artefacts") | {"widths": widths[n], "folder": f / "small"}
                          for n, f in folders.items()}  # fmt: skip
        return known[key]

    return run


def test_docs_metrics_has_every_metric_of_a_run(straight: Any) -> None:
    """And every metric that it has without a condition is there."""
    rows = read_rows(straight(SCAFFOLD)[1]["folder"] / "metrics.jsonl")
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["stage"], set()).update(row)
    assert found.keys() == STAGES.keys() - {"guard"}
    for stage, names in found.items():
        assert [name for name in sorted(names) if not documented(stage, name)] == []
        for metric in STAGES[stage].metrics:
            assert metric.when or any(metric.covers(name) for name in names), f"{stage}: no {metric.name}"
    assert {figure.metric for figure in DESCRIBED.headlines} <= found["eval"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(FEDAVG, id="fedavg", marks=pytest.mark.deep),
        pytest.param(SCAFFOLD, id="scaffold"),
        pytest.param(GRADIENT, id="gradient", marks=pytest.mark.deep),
    ],
)
def test_a_run_is_the_same_on_1_to_4_processes(straight: Any, overrides: list[str]) -> None:
    runs = straight(overrides)
    for size, run in runs.items():
        assert_same(run, runs[1], f"{size} processes against 1")
        assert all(width == run["widths"][0] for width in run["widths"]), "ranks plan alike"
    for size in (2, 4) if overrides is SCAFFOLD else (2, 3, 4):
        assert max(runs[size]["widths"][0]) > 1, f"no lane was wide on {size} processes"
    assert set(runs[1]["widths"][0]) == {1}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(FEDPROX, id="fedprox", marks=pytest.mark.deep),
        pytest.param(FEDADAM, id="fedadam", marks=pytest.mark.deep),
        pytest.param(CENTRALISED, id="centralised", marks=pytest.mark.deep),
    ],
)
def test_other_algorithms_are_the_same_on_1_and_4_processes(straight: Any, overrides: list[str]) -> None:
    runs = straight(overrides, (1, 4))
    assert_same(runs[4], runs[1], "4 processes against 1")
    assert max(runs[4]["widths"][0]) > 1, "no lane was wide on 4 processes"
    rounds = [row for row in map(json.loads, runs[1]["rows"]) if row["stage"] == "round"]
    moments = ["global/momentum_checksum", "global/second_moment_checksum"] if overrides is FEDADAM else []
    for name in ("global/checksum", *moments):
        assert len({row[name] for row in rounds}) == 2


@pytest.mark.deep
def test_rows_that_are_dropped_are_the_same_on_1_and_2_processes(straight: Any) -> None:
    runs = straight(DROPPED, (1, 2))
    assert_same(runs[2], runs[1], "2 processes against 1")
    rows = [json.loads(row) for row in runs[1]["rows"]]
    (kept,) = [row for row in rows if row["stage"] == "filter"]
    assert (kept["client/num_usable_rows"], kept["client/num_dropped_no_targets"]) == (11, 49)
    assert any(row["client/num_sat_out"] for row in rows if row["stage"] == "round")


def test_a_run_has_the_recorded_bits(straight: Any) -> None:
    found = digests(straight(SCAFFOLD)[1]["adapter"], straight(SCAFFOLD)[1]["rows"])
    if os.environ.get(RECORD):
        record({"scaffold": found})
    wanted = recorded("scaffold")
    if wanted is None:
        pytest.skip(f"no digests are recorded for {platform()}")
    assert found == wanted


def test_the_runs_that_are_compared_did_something(straight: Any) -> None:
    """Guards against a contract that holds because nothing happened."""
    runs = straight(SCAFFOLD)
    rows = [json.loads(row) for row in runs[1]["rows"]]
    rounds = [row for row in rows if row["stage"] == "round"]
    assert len({row["global/checksum"] for row in rounds}) == 3
    assert len({row["global/control_checksum"] for row in rounds}) == 3
    assert all(row["cai/num_iterations"] == 2 and row["client/num_trained"] == 3 for row in rounds)
    cai = next(row for row in rows if row["stage"] == "cai_data")
    assert cai["cai/num_usable"] >= 4
    points = [(row["round"], row["point"]) for row in rows if row["stage"] == "eval"]
    assert points == [(0, "pretrained"), (2, "before_cai"), (2, "after_cai"), (3, "before_cai"), (3, "after_cai")]
    assert len(set(runs[1]["replies"].values())) > 1  # training changed what the model says
    controls = {"eval/xstest_count", "eval/perplexity", "eval/advbench_guard_safe", "eval/hhh_count"}
    assert all(controls <= row.keys() for row in rows if row["stage"] == "eval")
    kinds = {name.rpartition("-")[0] for name in (path.split("/")[0] for path in runs[1]["artefacts"])}
    assert {"guard-adapter", "guard-verdicts", "cai-conversations"} <= kinds


@pytest.mark.deep
def test_the_other_runs_that_are_compared_did_something(straight: Any) -> None:
    assert straight(FEDAVG)[1]["adapter"] != straight(SCAFFOLD)[1]["adapter"]
    (light,) = [row for row in map(json.loads, straight(FEDAVG)[1]["rows"]) if row["stage"] == "filter"]
    assert light["client/num_kept_rows"] == 60 and 18 < light["client/kept_weight"] < 60
    (kept,) = [row for row in map(json.loads, straight(GRADIENT)[1]["rows"]) if row["stage"] == "filter"]
    assert 0 < kept["client/num_kept_rows"] < 60


def deep(*values: Any) -> Any:
    """A case for the deep suite alone."""
    return pytest.param(*values, marks=pytest.mark.deep)


@pytest.mark.parametrize(
    ("overrides", "stop", "sizes"),
    [
        deep(SCAFFOLD, ("after", 0), (2, 3)),  # the checkpoint is there: the next round follows, on other ranks
        deep(SCAFFOLD, ("before", 1), (4, 1)),  # rows and control variates of a round without a checkpoint: done anew
        deep(FEDAVG, ("before", 0), (1, 4)),  # nothing is finished: the pretrained model is measured anew
        deep(FEDADAM, ("after", 0), (4, 1)),  # the moments and the count of server steps come from the checkpoint
        deep(DROPPED, ("after", 0), (2, 1)),  # the same rows are dropped in each session
    ],
    ids=["after-checkpoint", "before-checkpoint", "before-the-first", "moments", "dropped-rows"],
)
def test_a_stopped_run_that_is_resumed_equals_one_that_was_not(
    pool: Any, square_file: Path, tmp_path: Path, straight: Any,
    overrides: list[str], stop: tuple[str, int], sizes: tuple[int, int],
) -> None:  # fmt: skip
    words = [*overrides, *places(tmp_path, square_file)]
    pool.run(sizes[0], simulate, words, stop)
    kept = sorted(p.name for p in (tmp_path / "small" / "checkpoints").glob("round-*"))
    assert kept == [f"round-{i + 1:06d}" for i in range(stop[1] + (stop[0] == "after"))]
    assert not (tmp_path / "small" / "adapter").exists()
    pool.run(sizes[1], simulate, words, None)
    assert_same(outcome(tmp_path / "small", tmp_path / "artefacts"), straight(overrides)[1], "resumed against straight")


def test_a_run_killed_in_mid_round_is_resumed(pool: Any, square_file: Path, tmp_path: Path, straight: Any) -> None:
    """SIGKILL to torchrun and all its processes while the second round trains; resumed on another number."""
    words = [*SCAFFOLD, *places(tmp_path, square_file)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "fedsim", "run", str(SMALL)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen([*torchrun, *words], cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 90
        while not re.search(r"round 2/3 · local training", log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.01)
    finally:
        kill(family(process.pid) if process.poll() is None else [])
        process.wait()
    kept = {p.name for p in (tmp_path / "small" / "checkpoints").glob("round-*")}
    assert "round-000001" in kept and "round-000003" not in kept, (
        "the second round, or at worst the third, was under way"
    )
    pool.run(3, simulate, words, None)
    assert_same(
        outcome(tmp_path / "small", tmp_path / "artefacts"),
        straight(SCAFFOLD)[1],
        "killed and resumed against straight",
    )
