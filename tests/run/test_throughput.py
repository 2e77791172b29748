"""A round's speed: tokens/s, MFU and roofline fraction from known work, times and peaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.model.cost import ModelCost, Work, rows_work
from fedsim.parallel.world import World
from fedsim.record.metrics import CLOCK_PREFIXES, decided, read_rows
from fedsim.report import finish
from fedsim.run.peak import Peak
from fedsim.run.simulation import Simulation
from fedsim.run.throughput import Meter

COST = ModelCost(body=1000, lora=10, head=100, attention=4, weight_bytes=4440, cache_bytes=8)
SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"


def metered(flops: float = 1e6, bytes_per_s: float = 1e6) -> Meter:
    peak = Peak(flops, bytes_per_s, "made up", 0.125)
    return Meter(COST, peak, World(OneRank(), torch.device("cpu"), exact=True))


def engine_after(work: Work) -> Any:
    return SimpleNamespace(pop_work=lambda: work)


def rows(*lengths: int) -> list[Any]:
    """Rows of so many tokens, the last three of them targets."""

    class Row(SimpleNamespace):
        def __len__(self) -> int:
            return int(self.length)

    return [Row(length=length, num_targets=3) for length in lengths]


def trained(meter: Meter, busy_s: list[float]) -> None:
    """Two clients of two steps of three rows, in micro-batches of two; one that failed; an adapter of 50."""
    trainer = SimpleNamespace(
        local=SimpleNamespace(micro_batch_size=2),
        batches=lambda client, shard, round_idx, num_steps: [shard] * num_steps,
        algorithm=SimpleNamespace(has_control=True),
        trainer=SimpleNamespace(adapter=SimpleNamespace(size=50)),
    )
    cohorts: Any = SimpleNamespace(trainer=trainer, shards={4: rows(5, 6, 7), 9: rows(8, 9, 10)})
    result: Any = SimpleNamespace(busy_s=busy_s, delivered=[4, 9])
    meter.trained(cohorts, {4: 2, 7: 2, 9: 2}, 0, result)


def test_training_is_charged_the_slowest_ranks_time() -> None:
    meter = metered()
    trained(meter, [0.5, 2.0])
    found = meter.pop({"time/train_s": 0.6, "time/aggregate_s": 1.9})
    tokens = 2 * (4 + 5 + 6 + 7 + 8 + 9)
    pairs = 2 * (16 + 25 + 36 + 49 + 64 + 81)
    flops = (4 * 1000 + 6 * 10) * tokens + 4 * 100 * 36 + 12 * 4 * pairs
    assert (found["perf/tokens"], found["perf/flops"]) == (tokens, flops)
    assert found["perf/bytes"] == 2 * 4440 * (2 * 2 * 2)
    assert found["perf/tokens_per_s"] == tokens / 2.0
    assert found["perf/mfu"] == found["perf/roofline"] == flops / 2.0 / 1e6
    assert found["perf/aggregate_bytes"] == 2 * (2 * 4 + 8) * 50  # deltas and control variates: fp32 in, fp64 out
    assert found["perf/aggregate_roofline"] == pytest.approx(2 * (2 * 4 + 8) * 50 / 0.5 / 1e6)
    assert "perf/aggregate_mfu" not in found
    assert (found["perf/peak_flops_per_s"], found["perf/peak_source"]) == (1e6, "made up")
    assert found["perf/peak_spread"] == 0.125


def test_the_roofline_is_the_longer_of_compute_and_memory() -> None:
    """Decoding one row: every step reads all weights for one token."""
    work = Work(tokens=10, targets=10, pairs=100, passes=10, cached=20)
    flops = 2 * 1010 * 10 + 2 * 100 * 10 + 4 * 4 * 100
    moved = 10 * 4440 + 20 * 8
    for bytes_per_s, least in ((1e6, moved / 1e6), (1e9, flops / 1e6)):
        meter = metered(bytes_per_s=bytes_per_s)
        meter.generated("evaluate", engine_after(work))
        found = meter.pop({"time/evaluate_s": 0.5})
        assert found["perf/evaluate_roofline"] == least / 0.5
        assert found["perf/evaluate_mfu"] == flops / 0.5 / 1e6
        assert found["perf/evaluate_tokens_per_s"] == 20.0
    meter.generated("evaluate", engine_after(Work()))
    assert "perf/evaluate_mfu" not in meter.pop({"time/evaluate_s": 0.5})  # nothing is left over, or counted as work


def test_cai_is_sft_dpo_and_the_references_pass() -> None:
    chosen, rejected = rows(5, 6), rows(7, 8)
    pairs = [SimpleNamespace(chosen=c, rejected=r) for c, r in zip(chosen, rejected, strict=True)]
    aligner: Any = SimpleNamespace(
        trainer=SimpleNamespace(settings=SimpleNamespace(micro_batch_size=4)), batches=lambda round_idx: [pairs]
    )
    meter = metered()
    meter.aligned(aligner, 0)
    found = meter.pop({"time/cai_s": 2.0})
    both = rows_work([*chosen, *rejected], 1)
    wanted = COST.train(rows_work(chosen, 1)) + COST.train(both) + COST.forward(both)
    assert (found["perf/cai_flops"], found["perf/cai_tokens"]) == (wanted.flops, wanted.tokens)
    assert found["perf/cai_mfu"] == wanted.flops / 2.0 / 1e6


def test_gpu_memory_is_the_fullest_process_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)

    class Two(OneRank):
        def gather(self, value: Any) -> list[Any]:
            return [value, (100, 9000, 11)]

    world = World(Two(), torch.device("cuda", 0), exact=False)
    world.traffic.num_bytes = 5
    found = Meter(COST, Peak(1.0, 1.0, ""), world).pop({})
    assert (found["perf/peak_gpu_bytes"], found["parallel/comm_bytes"]) == (9000, 16)
    assert found["perf/peak_rss_bytes"] > 100 and len(resets) == 1 and world.traffic.num_bytes == 0


@pytest.fixture()
def real_rows(tmp_path: Path, square_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """``real_rows()``: metric rows of a small run."""

    def run() -> list[dict[str, Any]]:
        monkeypatch.setattr(finish, "write_plots", lambda *_: [])
        brief = [
            "guard.kind=none",
            "eval.limit=2",
            "eval.advbench=",
            "eval.mt_bench=",
            "federation.num_rounds=1",
            f"data.square={square_file}",
        ]
        places = [f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
        simulation = Simulation(
            load_config(SMALL, [*brief, *places]), World(OneRank(), torch.device("cpu"), exact=True)
        )
        simulation.run()
        return read_rows(simulation.record.metrics_file)

    return run


def test_a_real_round_has_every_figure_and_none_is_compared(real_rows: Callable[[], list[dict[str, Any]]]) -> None:
    rows = real_rows()
    (row,) = [r for r in rows if r["stage"] == "round"]
    for prefix in ("perf/", "perf/cai_", "perf/evaluate_"):
        for name in ("flops", "bytes", "tokens", "tokens_per_s", "mfu", "roofline"):
            assert row[prefix + name] > 0
        assert row[f"{prefix}mfu"] < 1
    assert row["perf/mfu"] == row["perf/flops"] / row["parallel/makespan_s"] / row["perf/peak_flops_per_s"]
    assert row["perf/round_s"] >= sum(v for k, v in row.items() if k.startswith("time/"))
    (prepared,) = [r for r in rows if r["stage"] == "prepare"]
    assert prepared["perf/cai_generate_tokens"] > 0 and prepared["perf/evaluate_tokens"] > 0
    assert "perf/round_s" not in prepared
    assert not any(name.startswith(CLOCK_PREFIXES) for name in decided(row))
