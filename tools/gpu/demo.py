"""The demo from end to end: alike on one process and on four that share the GPU, and with the CPU's figures.

Four processes on one GPU sum over gloo, since NCCL refuses two ranks on one device (fedsim/parallel/world.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.base.artefacts import file_digest
from fedsim.base.version import git_state
from fedsim.record.manifest import versions
from fedsim.record.metrics import Row, decided_rows, read_rows
from tools.gpu.launch import ROOT, stand_ins
from tools.gpu.report import Report, Setting

REFERENCE = Path(__file__).with_name("demo_cpu.json")
DEMO = ROOT / "configs" / "demo.yaml"
RUNS = {
    False: ["federation.num_rounds=4"],  # the demo evaluates every fourth
    True: [
        "federation.num_rounds=1", "federation.num_clients=4", "federation.clients_per_round=3", "local.steps=2",
        "data.federated_rows=80", "data.guard_rows=24", "data.cai_rows=12", "guard.tune_epochs=0.2",
        "guard.measure_untuned=false", "cai.iterations=1", "cai.batch_size=4", "cai.max_new_tokens=64",
        "eval.every=1", "eval.limit=8", "eval.max_new_tokens=16", "parallel.threads=1",
    ],
}  # fmt: skip
"""What differs from the demo, by whether it is a dry run."""
FIGURES = ("eval/advbench_harmless", "eval/advbench_harmless_strict_world", "eval/hhh_accuracy", "eval/mt_bench")
Interval = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Started:
    """A run under way.

    Attributes:
        name: of the run, and of its folder.
        log: what it prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def wait(self) -> None:
        """Until it ends.

        Raises:
            RuntimeError: its exit status is not 0.
        """
        if self.process.wait() != 0:
            raise RuntimeError(f"{self.name} failed: {' '.join(self.log.read_text(errors='replace').split())[-700:]}")

    @property
    def rows(self) -> list[Row]:
        """What it decided."""
        return decided_rows(read_rows(self.folder / self.name / "metrics.jsonl"))

    @property
    def adapter(self) -> str:
        """Hash of its adapter."""
        return file_digest(self.folder / self.name / "adapter" / "adapter_model.safetensors")


def start(folder: Path, name: str, num_ranks: int, overrides: Sequence[str]) -> Started:
    """Start the demo with artefacts of its own, so that nothing is taken over from another run."""
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    own = folder / name.replace(" ", "-")
    own.mkdir(parents=True)
    arguments = [f"name={own.name}", f"record.dir={own}", f"record.artefacts={own / 'artefacts'}", "wandb.mode=off"]
    command = [*launcher, str(ROOT / "tools/gpu/launch.py"), str(DEMO), *arguments, *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = own / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    return Started(own.name, process, own, log)


def run(setting: Setting, report: Report) -> None:
    """All runs, one after the other."""
    overrides, many = RUNS[setting.dry], 2 if setting.dry else 4
    overrides = [*overrides, f"parallel.device={'cuda' if setting.cuda else 'cpu'}"]
    wanted: dict[str, tuple[int, list[str]]] = {"one process": (1, []), f"{many} processes": (many, [])}
    if setting.cuda:
        wanted["one process in fp32"] = (1, ["model.dtype=float32"])
    note = "; ".join(stand_ins())
    runs: dict[str, Started] = {}
    for name, (num_ranks, more) in wanted.items():  # one after the other: side by side they would share the GPU's time
        with report.guarding(f"demo, {name}: runs to its end"):
            runs[name] = start(setting.folder, name, num_ranks, [*overrides, *more])
            runs[name].wait()
            report.add(f"demo, {name}: exit status", 0.0, 0.0, note)
    one, shared = runs["one process"], runs[f"{many} processes"]
    with report.guarding("demo: one process and more, bit for bit: breaks off"):
        pairs = zip(one.rows, shared.rows, strict=True)
        report.add(f"demo, {many} processes: decided rows unlike one process's", sum(a != b for a, b in pairs), 0.0)
        report.add(f"demo, {many} processes: adapter's bits unlike one process's", one.adapter != shared.adapter, 0.0)
    with report.guarding("demo: the CPU's figures: breaks off"):
        known = json.loads(REFERENCE.read_text(encoding="utf-8"))["dry" if setting.dry else "full"]
        for name in ("one process in fp32", "one process") if setting.cuda else ("one process",):
            compare(report, name, figures(runs[name].rows), known, strict="fp32" in name or not setting.cuda)


def figures(rows: Sequence[Row]) -> dict[str, Interval]:
    """Low end, value and high end of the figures, by point of the run and name; one without interval is its own."""
    found = {}
    for row in rows:
        for name in FIGURES if row["stage"] == "eval" else ():
            if row.get(name) is not None:
                value = float(row[name])
                low, high = (float(row.get(name + end, value)) for end in ("_low", "_high"))
                found[f"round {row['round']}, {row['point']}, {name}"] = (low, value, high)
    return found


def compare(
    report: Report, run_name: str, mine: Mapping[str, Interval], known: Mapping[str, Sequence[float]], *, strict: bool
) -> None:
    """In fp32 a figure lies in the CPU's 95 % interval; in bf16, another course of training, the intervals overlap."""
    report.add(f"demo, {run_name}: figures that the CPU has and this run has not", len(known.keys() - mine.keys()), 0.0)
    for name in known.keys() & mine.keys():
        (low, _, high), (own_low, value, own_high) = known[name], mine[name]
        if strict:
            own_low = own_high = value
        outside = max(0.0, low - own_high, own_low - high)
        rule = "outside the CPU's 95 % interval" if strict else "between the 95 % intervals"
        report.add(f"demo, {run_name}, {name}: {value:.4g} against {low:.4g} to {high:.4g}, {rule} by", outside, 1e-9)


def write_reference(folder: Path) -> None:
    """Run both sizes here, on a CPU, and write the file that GPUs are compared with."""
    found: dict[str, Any] = {
        "versions": versions(),
        "commit": git_state(ROOT),
        "command": "python -m tools.gpu reference",
    }
    for size, dry in (("dry", True), ("full", False)):
        made = start(folder, size, 1 if dry else 2, RUNS[dry])
        made.wait()
        found[size] = figures(made.rows)
    REFERENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
