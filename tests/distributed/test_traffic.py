"""Communicated bytes: what each operation hands over, and a whole round against its closed form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.ranks import Term
from fedsim.config import load_config
from fedsim.parallel.world import process_world
from fedsim.record.metrics import read_rows
from fedsim.report import finish
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parent / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none", "parallel.wide_lanes=false",
         "local.steps=1"]  # fmt: skip
PAYLOAD = "x" * 1000


def each_operation(exact: bool) -> dict[str, int]:
    """Bytes that this rank is charged for by operation."""
    with process_world(exact=exact, threads=1, timeout_s=60, device="cpu") as world:
        ranks, everyone = world.ranks, world.everyone()
        found = {}
        segments = [[Term(torch.ones(10))], [Term(torch.ones(3))]]
        for name, run in {
            "gather": lambda: ranks.gather(PAYLOAD),
            "once": lambda: ranks.once(lambda: PAYLOAD),
            "map": lambda: ranks.map(lambda unit: PAYLOAD, range(4)),
            "sum": lambda: everyone.summer.sum(segments, [10, 3], 4),
            "alone": lambda: world.lane(world.rank, 1).summer.sum(segments, [10, 3], 4),
        }.items():
            world.traffic.pop()
            run()
            found[name] = world.traffic.pop()
        return found


@pytest.mark.parametrize("exact", [True, False])
def test_each_operation_counts_what_a_rank_contributes(pool: Any, exact: bool) -> None:
    first, second = pool.run(2, each_operation, exact)
    size = len(pickle.dumps(PAYLOAD))
    assert first["gather"] == second["gather"] == size
    assert (first["once"], second["once"]) == (len(pickle.dumps((PAYLOAD, None))), 0)
    assert first["map"] == second["map"] == len(pickle.dumps(({0: PAYLOAD, 2: PAYLOAD}, None)))
    assert first["sum"] == second["sum"] == (8 * 2 + 8 * 13 if exact else 4 * 13)
    assert first["alone"] == second["alone"] == 0


def simulate(overrides: list[str]) -> int:
    """A whole run; returns the adapter's size."""
    config = load_config(SMALL, overrides)
    finish.write_plots = lambda *_: []
    sizes = []
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu") as world:
        simulation = Simulation(config, world)
        assembled = simulation._assemble

        def assemble(*arguments: Any) -> Any:
            federation = assembled(*arguments)
            sizes.append(federation.flat.size)
            return federation

        simulation._assemble = assemble  # type: ignore[method-assign]
        simulation.run()
    return sizes[0]


@pytest.mark.parametrize(("algorithm", "num_vectors"), [("fedavg", 1), ("scaffold", 2)])
def test_a_round_is_one_reduction_and_some_agreement(
    pool: Any, square_file: Path, tmp_path: Path, algorithm: str, num_vectors: int
) -> None:
    """Σ over 2 ranks of 8 bytes · (9 scales + the vectors + 5 figures of 5 clients + seconds and tokens by rank)."""
    places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    size, _ = pool.run(2, simulate, [*BRIEF, *places, f"federation.algorithm={algorithm}"])
    rounds = [row for row in read_rows(tmp_path / "small" / "metrics.jsonl") if row["stage"] == "round"]
    reduction = 2 * 8 * (9 + num_vectors * size + 5 * 5 + 2 * 2)
    checksums = {name: str(i) * 32 for i, name in enumerate(["adapter", "control"][:num_vectors])}
    agreement = 2 * len(pickle.dumps(checksums)) + len(pickle.dumps((None, None)))
    agreement += 2 * len(pickle.dumps(([], {})))  # nobody failed, and no client was shared
    for row in rounds[:2]:  # the last one is evaluated too
        rest = row["parallel/comm_bytes"] - reduction - agreement  # what the row itself gathers: three whole numbers
        assert 0 < rest <= 2 * 60 if row is rounds[1] else rest > -len(pickle.dumps((None, None)))
    assert rounds[2]["parallel/comm_bytes"] > reduction + agreement + 2 * 60


def test_one_process_sends_nothing(pool: Any, square_file: Path, tmp_path: Path) -> None:
    places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    pool.run(1, simulate, [*BRIEF, *places, "federation.num_rounds=1"])
    (row,) = [row for row in read_rows(tmp_path / "small" / "metrics.jsonl") if row["stage"] == "round"]
    assert row["parallel/comm_bytes"] == 0
