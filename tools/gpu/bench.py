"""A stage of the benchmark with rows that are brought back, those that were timed before the part was ended too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from fedsim.study.bench_rows import Row, StageResult
from tools.bench import aggregation, generation, guard, models
from tools.bench.run import facts_of, load_stage, slug
from tools.bench.stage import Bench, memory_given_back
from tools.bench.table import table
from tools.gpu.report import Report, Setting

SHARE: Final = 0.45
"""Of the time that is left after the checks, for timed calls: warm-ups, tuning and a last turn come beside them."""


@dataclass(frozen=True)
class AsOnGpu(Bench):
    """A CPU whose benchmark takes the ways of a GPU: bfloat16, the GPU's repeats, and steps in a graph's stead."""

    @property
    def dtype(self) -> torch.dtype:
        """As on CUDA."""
        return torch.bfloat16

    @property
    def cuda(self) -> bool:
        """The GPU's branches."""
        return True


def run(setting: Setting, report: Report, name: str) -> None:
    """Check, then time what is correct, as ``tools/bench/run.py`` does."""
    size = models.MICRO if setting.dry else models.GPU
    bench = (AsOnGpu if setting.dry else Bench)(setting.device, size, torch.get_num_threads())
    if setting.dry:
        bench = replace(bench, repeats=1)
        _shrink()
    stage = load_stage(name)
    facts = facts_of(_as_it_is(bench), setting.commit)
    with memory_given_back(bench):
        checks = stage.check(bench)
    report.take(checks)
    wrong = frozenset(check.part for check in checks if not check.passed)
    if "" in wrong:
        return
    rows: list[Row] = []
    file = setting.kept(f"rows/{slug(facts['device'])}/{name}.json")
    began = time.monotonic()
    budget_s = 0.0 if setting.dry else SHARE * max(0.0, setting.seconds_left)
    with memory_given_back(bench):
        for row in stage.time(replace(bench, wrong=wrong, budget_s=budget_s)):
            rows.append(row)
            StageResult(name, facts, checks, rows).write(file)
            report.figure(f"row {len(rows)}", _words(row))
    report.figure("timed in, s", round(time.monotonic() - began, 1))
    report.add("rows: none was timed", float(not rows), 0.0)
    print(table([StageResult(name, facts, checks, rows)]).plain(), flush=True)


def _as_it_is(bench: Bench) -> Bench:
    """The benchmark's machine as it is, for the facts of a row."""
    return Bench(bench.device, bench.size, bench.threads) if isinstance(bench, AsOnGpu) else bench


def _words(row: Row) -> dict[str, object]:
    """A row in short."""
    return {
        "name": row.name,
        "p50_s": None if row.seconds is None else row.seconds.p50,
        "peer": row.peer,
        "ratio": row.ratio,
        "of_floor": row.fraction_of_floor,
        **row.figures,
    }


def _shrink() -> None:
    """Few rows for the GPU's ways on a CPU, and stand-ins for graphs and events."""
    for module, changed in {
        generation: {"ROWS": 6, "BATCHES": (2, 6), "OURS": (3, 2), "LEAST": 1},
        guard: {"ROWS": 12, "BATCHES": (2, 4), "BUDGETS": (2048, 4096)},
    }.items():
        for name, value in changed.items():
            setattr(module, name, {True: value})
    setattr(generation, "capture_cuda", generation.Called)  # noqa: B010
    setattr(aggregation, "launches", _called)  # noqa: B010
    generation.Conversations.ours.__defaults__ = (generation.Called,)


def _called(call: Callable[[], object], repeats: int, together: int = 1) -> list[float]:
    """Seconds of calls, in the stead of events on a stream."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found
