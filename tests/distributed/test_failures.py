"""Failing clients, drop-outs and stragglers on several processes: the same bits on 1, 2 and 4, and after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.base.artefacts import file_digest
from fedsim.base.errors import RunError
from fedsim.base.journal import in_words
from fedsim.base.planner import FREE
from fedsim.config import load_config
from fedsim.parallel.world import process_world
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.metrics import decided_rows, read_rows
from fedsim.report import finish
from fedsim.run import cohort
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parent / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none", "failures.on_client_error=skip",
         "failures.min_clients=0"]  # fmt: skip
MIXED = ["federation.algorithm=scaffold", "failures.dropout_rate=0.2", "failures.straggler_rate=0.5"]
# Two clients a round, in the first the two that fail: on four processes each has a wide lane, equal ranks being
# assumed; the member that meets the row that raises does so alone.
PAIRS = ["federation.algorithm=scaffold", "federation.scaffold_correction=gradient", "federation.clients_per_round=2",
         "federation.num_rounds=4", "seed=24"]  # fmt: skip
RAISES, IS_NAN = 2, 4


class Stopped(Exception):
    """The interruption that a test injects."""


def simulate(overrides: list[str], stop: int | None) -> dict[str, Any]:
    """A run in which client 2 has a row that raises an error and client 4 one whose loss is NaN.

    Args:
        stop: raise on rank 0 before the checkpoint of this round.

    Returns:
        Widths of the lanes by client, and the error that this rank ended with.
    """
    config = load_config(SMALL, overrides)
    widths: list[tuple[int, int]] = []
    plan_round = cohort.plan_round

    def planned(*arguments: Any, **named: Any) -> Any:
        tokens, seconds, *rest = arguments  # ranks of one speed: how fast this machine ran must not decide a width
        plan = plan_round(tokens, [1.0] * len(seconds), *rest, **{**named, "shared": FREE})
        widths.extend((job.client, job.width) for job in plan.jobs)
        return plan

    cohort.plan_round = planned
    finish.write_plots = lambda *_: []
    error = ""
    try:
        with process_world(exact=config.parallel.exact, threads=1, timeout_s=60, device="cpu") as world:
            simulation = Simulation(config, world)
            save, assembled = simulation.record.checkpoints.save, simulation._assemble

            def assemble(*arguments: Any) -> Any:
                federation = assembled(*arguments)
                shards = federation.shards
                row = shards[RAISES][0]
                shards[RAISES][0] = replace(row, input_ids=np.full_like(row.input_ids, 10**6))
                shards[IS_NAN][0] = replace(shards[IS_NAN][0], weight=float("nan"))
                return federation

            def stopping(checkpoint: Checkpoint) -> None:
                if checkpoint.round_idx == stop:
                    raise Stopped
                save(checkpoint)

            simulation._assemble = assemble  # type: ignore[method-assign]
            simulation.record.checkpoints.save = stopping  # type: ignore[method-assign]
            simulation.run()
    except (RunError, SystemExit, Stopped) as ended:
        error = f"{type(ended).__name__}: {ended}"
        error += f"; {in_words(place)}" if (place := getattr(ended, "place", {})) else ""
    finally:
        cohort.plan_round = plan_round
    return {"widths": widths, "error": error}


def places(folder: Path, square_file: Path) -> list[str]:
    return [f"data.square={square_file}", f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}"]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run decided."""
    run = folder / "small"
    last = sorted((run / "checkpoints").iterdir())[-1]
    return {
        "rows": [json.dumps(row) for row in decided_rows(read_rows(run / "metrics.jsonl"))],
        "client_state": {p.name: file_digest(p) for p in sorted((run / "client_state").iterdir())},
        "client_rounds": json.loads((last / "checkpoint.json").read_text())["client_rounds"],
        "state": file_digest(last / "state.safetensors"),
        "adapter": file_digest(run / "adapter" / "adapter_model.safetensors"),
    }


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, found["rows"]) if row["stage"] == "round"]


@pytest.mark.parametrize(
    "overrides", [pytest.param(MIXED, id="mixed", marks=pytest.mark.deep), pytest.param(PAIRS, id="pairs")]
)
def test_failures_are_the_same_on_1_2_and_4_processes(
    pool: Any, square_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """And after a stop in the second round, gone on with on another number."""
    folders = {name: tmp_path / name for name in ("1", "2", "4", "resumed")}
    words = {name: [*BRIEF, *overrides, *places(folder, square_file)] for name, folder in folders.items()}
    jobs = [(int(name), simulate, words[name], None) for name in ("4", "2", "1")]
    answers = pool.run_all([*jobs, (2, simulate, words["resumed"], 1)])
    assert all(rank["error"] == "" for ranks in answers[:3] for rank in ranks)
    assert [p.name for p in (folders["resumed"] / "small" / "checkpoints").iterdir()] == ["round-000001"]
    pool.run(4, simulate, words["resumed"], None)
    found = {name: outcome(folder) for name, folder in folders.items()}
    for name, other in found.items():
        for part, value in found["1"].items():
            assert other[part] == value, f"{name}: {part} differ"
    rows = figures(found["1"])
    reasons = {(n, v) for row in rows for n, v in row.items() if n.startswith("client/failed_")}
    assert reasons == {("client/failed_002", "raised"), ("client/failed_004", "not finite")}
    assert not {str(RAISES), str(IS_NAN)} & found["1"]["client_rounds"].keys() and found["1"]["client_rounds"]
    if overrides is MIXED:
        assert sum(row["client/num_dropped_out"] for row in rows) and sum(row["client/num_stragglers"] for row in rows)
    else:
        first = dict(answers[0][0]["widths"][:2])
        assert first.keys() == {RAISES, IS_NAN} and min(first.values()) > 1
        assert [row["client/num_trained"] for row in rows] == [0, 1, 2, 2]


def test_a_member_that_raises_ends_the_run_with_its_own_words(pool: Any, square_file: Path, tmp_path: Path) -> None:
    """One client on a lane of two under the policy stop: one rank says what happened, to whichever member it did."""
    words = ["failures.on_client_error=stop", "failures.min_clients=1", "federation.clients_per_round=1", "seed=1"]
    first, second = pool.run(2, simulate, [*BRIEF, *words, *places(tmp_path, square_file)], None)
    assert first["widths"][-1] == (RAISES, 2)
    quiet, told = sorted([first["error"], second["error"]], key=len)  # rank 0 speaks, unless it is seconds late
    assert quiet == "SystemExit: 2" and told.startswith("RunError: client 2 failed (raised): IndexError")
    assert told.endswith(", local training, round 3, client 2")
    assert "set failures.on_client_error=skip" in told
