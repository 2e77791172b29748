"""One rank raises, dies, or stands still: the others end in time, and the cause is said once, with its place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.exit_file import read_ending
from fedsim.parallel import sums, world
from fedsim.parallel.device import GLOO, NCCL
from fedsim.train.client import ClientTrainer
from fedsim.train.loop import Trainer
from tests.distributed.entry import run_entry

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
CLIENT_WORDS = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.xstest=",
                "eval.mt_bench=", "eval.helpful=", "eval.guard_judge=none", "parallel.wide_lanes=false"]  # fmt: skip
TIMEOUT_S = 4.0
Ended = tuple[int, str, float]


def fail(words: list[str], rank: int, how: str) -> Ended:
    """A run in which ``rank`` fails in its first client of round 2: exit code, standard error, seconds from there."""
    train, began = ClientTrainer.train, [0.0]

    def failing(self: ClientTrainer, client: int, rows: Any, round_idx: int, *rest: Any) -> Any:
        if round_idx == 1:
            began[0] = began[0] or time.monotonic()
            if int(os.environ["RANK"]) == rank:
                if how == "raise":
                    raise ZeroDivisionError("a bug")
                time.sleep(4 * TIMEOUT_S)
        return train(self, client, rows, round_idx, *rest)

    ClientTrainer.train = failing  # type: ignore[method-assign, assignment]
    try:
        return *run_entry(words), time.monotonic() - began[0]
    finally:
        ClientTrainer.train = train  # type: ignore[method-assign]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("how", "bad"),
    [pytest.param("raise", 0, marks=pytest.mark.deep), ("raise", 2), pytest.param("stall", 0, marks=pytest.mark.deep)],
)
def test_the_others_end_and_the_cause_is_said_once(
    pool: Any, square_file: Path, tmp_path: Path, how: str, bad: int
) -> None:
    words = [str(SMALL), *CLIENT_WORDS, f"parallel.timeout_s={TIMEOUT_S}", f"data.square={square_file}",
             f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]  # fmt: skip
    ended: list[Ended] = pool.run(3, fail, words, bad, how)
    (line,) = [line for _, text, _ in ended for line in errors(text)]
    place = r"local training, round 2, client "
    run = tmp_path / "small"
    note = read_ending(run)
    assert note is not None and note["message"] == line
    if how == "raise":
        assert line.startswith("error: ZeroDivisionError: a bug (rank") and f"rank {bad}, {place}" in line
        assert sorted(code for code, _, _ in ended) == [1, 2, 2] and note["reason"] == "error"
        assert (note["rank"], note["stage"], note["round"]) == (bad, "local training", 2) and note["client"] >= 0
        assert sum("Traceback" in text for _, text, _ in ended) == 1
    else:
        assert f"rank {bad} did not answer for 4 s (parallel.timeout_s), last seen in {place}" in line
        assert note["reason"] == "lost rank"
        assert all(code == 2 for code, _, _ in ended)
        waited = [seconds for rank, (_, _, seconds) in enumerate(ended) if rank != bad]
        assert max(waited) < TIMEOUT_S + 12
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["round"] for row in rows) == 1, "the round that failed left no row"
    events = [json.loads(row)["event"] for row in (run / "logs" / f"rank-{bad:03d}.jsonl").read_text().splitlines()]
    assert events[0] == "start" and "begin" in events and ("error" in events or how == "stall")


def stall_in_lane(words: list[str], rank: int) -> Ended:
    """A run whose sums behave as over NCCL: nothing raises, and a host that waits for another rank waits for ever.

    ``rank`` stands still in the second step of a client that both ranks share.
    """
    backward, reduce, began = Trainer._backward, sums.dist.all_reduce, [0.0]

    def standing(self: Trainer, step: int, *rest: Any) -> Any:
        if step == 1:
            began[0] = began[0] or time.monotonic()
            if int(os.environ["RANK"]) == rank:
                time.sleep(4 * TIMEOUT_S)
        return backward(self, step, *rest)

    def silent(tensor: Any, op: Any = sums.dist.ReduceOp.SUM, group: Any = None) -> None:
        if tensor.numel() == 1:  # the heartbeat, which goes over gloo
            reduce(tensor, op=op, group=group)
            return
        try:
            reduce(tensor, op=op, group=group)
        except RuntimeError:
            time.sleep(1000)  # where NCCL would leave it: in a kernel that does not end

    Trainer._backward = standing  # type: ignore[method-assign]
    sums.dist.all_reduce = silent  # type: ignore[assignment]
    world.NCCL = GLOO  # type: ignore[misc]
    try:
        return *run_entry(words), time.monotonic() - began[0]
    finally:
        Trainer._backward = backward  # type: ignore[method-assign]
        sums.dist.all_reduce = reduce
        world.NCCL = NCCL  # type: ignore[misc]


@pytest.mark.deep
@pytest.mark.parametrize("exact", ["true", "false"])
def test_a_rank_that_stands_still_over_nccl_is_named(pool: Any, square_file: Path, tmp_path: Path, exact: str) -> None:
    words = [str(SMALL), *CLIENT_WORDS, "parallel.wide_lanes=true", "federation.clients_per_round=1",
             f"parallel.exact={exact}", f"parallel.timeout_s={TIMEOUT_S}", f"data.square={square_file}",
             f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]  # fmt: skip
    ended: list[Ended] = pool.run(2, stall_in_lane, words, 1)
    (line,) = [line for _, text, _ in ended for line in errors(text)]
    assert "rank 1 did not answer for 4 s (parallel.timeout_s), last seen in local training, round 1, client" in line
    note = read_ending(tmp_path / "small")
    assert note is not None and (note["reason"], note["message"], note["rank"]) == ("lost rank", line, 1)
    assert [code for code, _, _ in ended] == [2, 2] and ended[0][2] < TIMEOUT_S + 12
