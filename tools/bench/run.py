"""Run the benchmark's stages on this machine and print one table: ``python tools/bench/run.py [--stages a,b]``.

Each stage first compares its results with a reference. What is wrong is named and not timed, a stage that breaks off
is named with its error, and the others go on; both make the exit status 1. A stage that would begin after --minutes is
left out. The rows go to ``tools/bench/results/<device>/<stage>.json``. With a GPU the model is Llama-3.1-8B in
bfloat16, without one a Llama of 5.8 M parameters in float32; both have random weights.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

import torch  # noqa: E402

from fedsim.attention.backends import leave_out_cudnn  # noqa: E402
from fedsim.base.terminal import steady_terminal  # noqa: E402
from fedsim.base.version import git_state  # noqa: E402
from fedsim.parallel.host_memory import keep_freed_memory  # noqa: E402
from fedsim.record.manifest import hardware, package_versions  # noqa: E402
from fedsim.study.bench_rows import Row, StageResult  # noqa: E402
from tools.bench import models  # noqa: E402
from tools.bench.stage import Bench, LeftOut, Stage, memory_given_back  # noqa: E402
from tools.bench.table import table  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHARES: dict[str, tuple[float, float]] = {  # seconds of MINUTES, on a CPU and on a GPU
    "attention": (5, 15),
    "local_step": (90, 60),
    "wide_lane": (15, 30),
    "guard": (50, 90),
    "generation": (190, 120),
    "cai_iteration": (100, 60),
    "aggregation": (13, 20),
    "engine": (120, 85),
}
STAGES = tuple(SHARES)
MINUTES = 10.0
WRITTEN = ("tools/bench/results", "docs/results")  # by this tool, not what it measures
PACKAGES = ("torch", "transformers", "peft", "trl", "triton", "numpy")


def load_stage(name: str) -> Stage:
    """The stage that ``tools/bench/<name>.py`` calls ``STAGE``."""
    stage: Stage = importlib.import_module(f"tools.bench.{name}").STAGE
    assert stage.name == name, "a stage is called as its file is"
    return stage


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def facts_of(bench: Bench, commit: str | None = None) -> dict[str, Any]:
    """Where and with what the figures are measured; ``commit`` is of a tree that is no clone."""
    there, git = hardware(), git_state(ROOT, WRITTEN)
    peak = bench.peak()
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else there["cpu"],
        "cores": there["cores"],
        "threads": bench.threads,
        "model": bench.size.name,
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": commit if git is None else git["commit"] + (" (dirty)" if git["modified"] else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak": {"flops_per_s": peak.flops, "bytes_per_s": peak.bytes_per_s, "source": peak.source},
    }


def run_stage(stage: Stage, bench: Bench, facts: Mapping[str, Any]) -> StageResult:
    """Check, then time what is correct."""
    began = time.perf_counter()
    bench.say(f"{stage.name}: checking")
    with memory_given_back(bench):
        checks = stage.check(bench)
    for check in checks:
        outcome = "ok" if check.passed else "FAILED"
        bench.say(f"  {outcome}: {check.what}: {check.error:.2g} (limit {check.limit:.2g})")
    wrong = frozenset(check.part for check in checks if not check.passed)
    rows: list[Row] = []
    if "" not in wrong:
        bench.say(f"{stage.name}: timing")
        left = max(0.0, bench.budget_s - (time.perf_counter() - began))
        with memory_given_back(bench):
            rows = list(stage.time(replace(bench, budget_s=left, wrong=wrong)))
    bench.say(f"{stage.name}: {time.perf_counter() - began:.0f} s")
    return StageResult(stage.name, facts, checks, rows)


def run(
    stages: Sequence[Stage], bench: Bench, out: Path, minutes: float | None = None, commit: str | None = None
) -> int:
    """Run stages, write a file for each that was timed, print the table; the exit status.

    Args:
        minutes: of the whole run, of which stages get their shares; None: each takes what ``bench`` allows a stage.
        commit: see :func:`facts_of`.
    """
    began = time.perf_counter()
    facts = facts_of(bench, commit)
    results, failed = [], []
    for stage in stages:
        given = bench
        if minutes is not None:
            if time.perf_counter() - began > 60 * minutes:
                bench.say(f"{stage.name}: left out, the {minutes:g} minutes are over")
                continue
            given = replace(bench, budget_s=SHARES[stage.name][bench.cuda] * minutes / MINUTES)
        try:
            result = run_stage(stage, given, facts)
        except LeftOut as why:
            bench.say(f"{stage.name}: left out: {why}")
            continue
        except Exception as error:  # whatever ends one stage, the others are measured
            what = next(iter(str(error).splitlines()), "")
            bench.say(f"{stage.name}: FAILED: {type(error).__name__}: {what}")
            failed.append(f"{stage.name} ({type(error).__name__})")
            continue
        failed += [
            f"{stage.name} ({part})" if part else stage.name
            for part in sorted({check.part for check in result.correctness if not check.passed})
        ]
        if result.rows:
            file = out / f"{stage.name}.json"
            result.write(file)
            results.append(result)
    bench.say(table(results).plain())
    if failed:
        bench.say(f"wrong or broken off: {', '.join(failed)}")
    return 1 if failed else 0


@steady_terminal()
def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench/run.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--stages", default=",".join(STAGES), help="which, by name, separated by commas (all)")
    parser.add_argument("--out", type=Path, help="folder for the rows (tools/bench/results/DEVICE)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what the whole run should take (10)")
    parser.add_argument("--commit", help="hash of the commit that this tree is of, where it has no .git")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each piece of work, where affordable")
    parser.add_argument("--threads", type=int, default=2, help="of torch, without a GPU")
    found = parser.parse_args(arguments)
    names = [name for name in found.stages.split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages: no stage {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    if found.commit is not None and (ROOT / ".git").exists():
        parser.error("--commit: this tree has a .git, which tells the commit; leave the argument out")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    leave_out_cudnn()  # holds for the peers too
    torch.set_num_threads(found.threads)
    if not cuda:
        keep_freed_memory()  # likewise
    warnings.simplefilter("ignore", FutureWarning)  # what peers' libraries say of each other's names
    bench = Bench(device, models.GPU if cuda else models.CPU, found.threads, found.repeats)
    name = torch.cuda.get_device_name(device) if cuda else f"{hardware()['cpu']} {found.threads} threads"
    out = RESULTS / slug(name) if found.out is None else found.out.resolve()
    return run([load_stage(name) for name in names], bench, out, found.minutes, found.commit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
