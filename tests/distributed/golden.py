"""Golden digests of whole runs: what a change that moves code must leave as it is, bit for bit.

Bits depend on the processor and on torch's kernels, so that ``golden.json`` holds digests by platform. After a wanted
change of results, and on a platform that is not recorded yet::

    python tests/distributed/golden.py
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from fedsim.base.artefacts import file_digest
from fedsim.record.manifest import hardware
from fedsim.record.metrics import decided_rows, read_rows

ROOT: Final = Path(__file__).parents[2]
GOLDEN: Final = Path(__file__).with_name("golden.json")
DEMO: Final = ROOT / "configs" / "demo.yaml"

Digests = dict[str, str]
"""SHA-256 (hex) of a run's adapter file and of its decided metric rows."""


def platform() -> str:
    """Facts that the bits of a run on CPU depend on: processor, its caches and instructions, and versions."""
    facts = {}  # of the first core
    for line in reversed(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()):
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    core = ", ".join(f"{name} {facts.get(name, 'unknown')}" for name in ("cpu family", "model", "cache size"))
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    return f"{hardware()['cpu']}, {core}, {capability}, {versions}"


def digests(adapter: str, rows: Sequence[str]) -> Digests:
    """Digests of a run from its adapter's SHA-256 and its decided metric rows as JSON texts."""
    return {"adapter": adapter, "rows": hashlib.sha256("\n".join(rows).encode()).hexdigest()}


def run_demo(folder: Path, num_ranks: int) -> Digests:
    """Run the demo in a folder of its own, without plots and W&B."""
    words = [f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}", "wandb.mode=off", "name=demo"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, "launch/run.py", str(DEMO), *words], cwd=ROOT, env=environment, check=True)
    rows = [json.dumps(row) for row in decided_rows(read_rows(folder / "demo" / "metrics.jsonl"))]
    return digests(file_digest(folder / "demo" / "adapter" / "adapter_model.safetensors"), rows)


def recorded(name: str) -> Digests | None:
    """The digests of a run on this platform; None where there are none."""
    known: dict[str, dict[str, Digests]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return known.get(platform(), {}).get(name)


def record(found: dict[str, Digests]) -> None:
    """Write digests of this platform, beside those of other runs and platforms."""
    known: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    known[platform()] = known.get(platform(), {}) | found
    GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


RECORD: Final = "FEDSIM_RECORD_GOLDEN"
"""Variable with which a test records the digests of its run instead of comparing them."""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        record({"demo": run_demo(Path(temporary), 2)})
    test = [sys.executable, "-m", "pytest", "-q", "tests/distributed/test_exact.py", "-k", "recorded"]
    subprocess.run(test, cwd=ROOT, env={**os.environ, RECORD: "1"}, check=True)
