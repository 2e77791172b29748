"""Run the benchmark's stages on this machine and print one table: ``python tools/bench/run.py [--stages a,b]``.

Each stage first compares its results with a reference; one that fails is named, not timed, and makes the exit status 1.
The rows go to ``tools/bench/results/<device>/<stage>.json``. With a GPU the model is Llama-3.1-8B in bfloat16, without
one a Llama of 5.8 M parameters in float32; both have random weights.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

import torch  # noqa: E402

from fedsim.record.manifest import git_state, hardware, package_versions  # noqa: E402
from tools.bench import models  # noqa: E402
from tools.bench.proofs import enter  # noqa: E402
from tools.bench.rows import StageResult  # noqa: E402
from tools.bench.stage import Bench, Stage, memory_given_back  # noqa: E402
from tools.bench.table import table  # noqa: E402

RESULTS = Path(__file__).parent / "results"
STAGES: tuple[str, ...] = (
    "attention",
    "local_step",
    "wide_lane",
    "guard",
    "generation",
    "cai_iteration",
    "aggregation",
    "engine",
)
WRITTEN = ("tools/bench/results", "kernels/proved.json", "README.md")  # by this tool, not what it measures
PACKAGES = ("torch", "transformers", "peft", "trl", "triton", "numpy")


def load_stage(name: str) -> Stage:
    """The stage that ``tools/bench/<name>.py`` calls ``STAGE``."""
    stage: Stage = importlib.import_module(f"tools.bench.{name}").STAGE
    assert stage.name == name, "a stage is called as its file is"
    return stage


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def facts_of(bench: Bench) -> dict[str, Any]:
    """Where and with what the figures are measured."""
    there, git = hardware(), git_state(ROOT, WRITTEN)
    peak = bench.peak()
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else there["cpu"],
        "cores": there["cores"],
        "threads": bench.threads,
        "model": bench.size.name,
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": None if git is None else git["commit"] + (" (dirty)" if git["modified"] else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak": {"flops_per_s": peak.flops, "bytes_per_s": peak.bytes_per_s, "source": peak.source},
    }


def run_stage(stage: Stage, bench: Bench, facts: Mapping[str, Any]) -> StageResult:
    """Check, then time if all is correct."""
    began = time.perf_counter()
    bench.say(f"{stage.name}: checking")
    with memory_given_back(bench):
        checks = stage.check(bench)
    for check in checks:
        outcome = "ok" if check.passed else "FAILED"
        bench.say(f"  {outcome}: {check.what}: {check.error:.2g} (limit {check.limit:.2g})")
    rows = []
    if all(check.passed for check in checks):
        bench.say(f"{stage.name}: timing")
        with memory_given_back(bench):
            rows = stage.time(bench)
    bench.say(f"{stage.name}: {time.perf_counter() - began:.0f} s")
    return StageResult(stage.name, facts, checks, rows)


def run(stages: Sequence[Stage], bench: Bench, out: Path) -> int:
    """Run stages, write a file for each that is correct, print the table; the exit status."""
    facts = facts_of(bench)
    results, failed = [], []
    for stage in stages:
        if stage.needs_cuda and not bench.cuda:
            bench.say(f"{stage.name}: left out, it needs a CUDA device")
            continue
        result = run_stage(stage, bench, facts)
        if all(check.passed for check in result.correctness):
            file = out / f"{stage.name}.json"
            result.write(file)
            results.append(result)
            if bench.cuda and file.is_relative_to(ROOT):
                for path in enter(result.correctness, facts, file.relative_to(ROOT).as_posix()):
                    bench.say(f"  {path}: shown right, entered into kernels/proved.json")
        else:
            failed.append(stage.name)
    bench.say(table(results).plain())
    if failed:
        bench.say(f"not timed, because a check failed: {', '.join(failed)}")
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench/run.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--stages", default=",".join(STAGES), help="which, by name, separated by commas (all)")
    parser.add_argument("--out", type=Path, help="folder for the rows (tools/bench/results/DEVICE)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each piece of work, where affordable")
    parser.add_argument("--threads", type=int, default=2, help="of torch, without a GPU")
    found = parser.parse_args(arguments)
    names = [name for name in found.stages.split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages: no stage {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    torch.set_num_threads(found.threads)
    warnings.simplefilter("ignore", FutureWarning)  # what peers' libraries say of each other's names
    bench = Bench(device, models.GPU if cuda else models.CPU, found.threads, found.repeats)
    place = slug(torch.cuda.get_device_name(device)) if cuda else f"cpu-{found.threads}-threads"
    return run([load_stage(name) for name in names], bench, found.out or RESULTS / place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
