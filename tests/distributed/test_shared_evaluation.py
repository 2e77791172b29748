"""The pretrained model's evaluation is shared by runs of any number of processes, which go on alike from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.config import load_config
from fedsim.parallel.world import process_world
from fedsim.record.metrics import decided_rows, read_rows
from fedsim.report import finish
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parent / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=2", "eval.guard_judge=none",
         "record.texts=false", "federation.num_rounds=1", "local.steps=1"]  # fmt: skip


def simulate(overrides: list[str]) -> None:
    """A whole run."""
    config = load_config(SMALL, overrides)
    finish.write_plots = lambda *_: []
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu") as world:
        Simulation(config, world).run()


@pytest.mark.deep
def test_two_ranks_read_what_one_has_measured_as_they_would(pool: Any, square_file: Path, tmp_path: Path) -> None:
    def rows(size: int, run: str, artefacts: str) -> list[dict[str, Any]]:
        places = [f"data.square={square_file}", f"record.dir={tmp_path / run}"]
        pool.run(size, simulate, [*BRIEF, *places, f"record.artefacts={tmp_path / artefacts}"])
        return read_rows(tmp_path / run / "small" / "metrics.jsonl")

    runs = [rows(1, "one", "a"), rows(2, "two", "b"), rows(2, "again", "a")]
    assert all(decided_rows(run) == decided_rows(runs[0]) for run in runs)
    pretrained, last = zip(*([row for row in run if row["stage"] == "eval"] for run in runs), strict=True)
    assert [row["perf/reused"] for row in pretrained] == [False, False, True]
    assert {row["artefact"] for row in pretrained} == {path.name for path in (tmp_path / "a").glob("pretrained-*")}
    assert not any("artefact" in row or "perf/reused" in row for row in last), "no other point is shared"
