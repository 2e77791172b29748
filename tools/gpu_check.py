"""Prove the CUDA paths right in one command: ``python tools/gpu_check.py [--out FILE.json] [--parts a,b] [--dry-run]``.

Each part is a process of its own with a time limit; what one finds, or that it breaks off, stops no other. All checks
go to one JSON file and into a table. The exit status is 1 if any check failed. Without a GPU, or with --dry-run, the
parts are run at micro sizes on the CPU, which proves nothing about CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

import torch  # noqa: E402

from fedsim.attention.backends import leave_out_cudnn  # noqa: E402
from fedsim.record.manifest import hardware, package_versions  # noqa: E402
from fedsim.record.tables import Table  # noqa: E402
from fedsim.terminal import steady_terminal  # noqa: E402
from fedsim.version import git_state  # noqa: E402
from tools.bench.stage import LeftOut  # noqa: E402
from tools.gpu.report import Check, Report, Setting  # noqa: E402

PARTS = {  # module of tools.gpu, and seconds of eight minutes
    "sums": ("sums", 30),
    "tiny": ("tiny", 90),
    "shapes": ("shapes", 90),
    "demo": ("demo", 150),
    "memory": ("memory", 70),
}
BUDGET_S = 480.0
PACKAGES = ("torch", "transformers", "peft", "triton", "numpy", "tokenizers", "safetensors", "flash-attn",
            "datasets", "trl", "deepspeed", "wandb", "matplotlib")  # fmt: skip
CHILD = [sys.executable, str(Path(__file__).resolve())]


def part_in_this_process(name: str, lines: Path, dry: bool) -> None:
    """Make one part's checks."""
    cuda = torch.cuda.is_available() and not dry
    leave_out_cudnn()  # holds for the references too
    torch.set_num_threads(1)
    report = Report(name, lines)
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        try:
            importlib.import_module(f"tools.gpu.{PARTS[name][0]}").run(Setting(device, not cuda, Path(folder)), report)
        except LeftOut as why:
            report.leave_out("the whole part", str(why))


def part(name: str, dry: bool, limit_s: float) -> list[Check]:
    """Make one part's checks in a process of its own; one that breaks off or takes too long has a failed check more."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        command = [*CHILD, "--child", name, "--lines", str(lines), *(["--dry-run"] if dry else [])]
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONPATH": str(ROOT)}
        if dry:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # for the demo's processes too
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                status: int | None = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end_all(process)
        found = []
        if lines.exists():
            found = [Check.read(json.loads(line)) for line in lines.read_text(encoding="utf-8").splitlines()]
        if status != 0 or not found:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            why = f"ended after {limit_s:.0f} s" if status is None else f"exit status {status}: {' '.join(last)[:300]}"
            found.append(Check(name, "the part comes to its end", math.nan, 0.0, time.perf_counter() - began, why))
    return found


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End a part and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def facts(dry: bool) -> dict[str, Any]:
    """Where, when and with what the checks are made."""
    git = git_state(ROOT)
    cuda = torch.cuda.is_available() and not dry
    return {
        "device": torch.cuda.get_device_name(0) if cuda else hardware()["cpu"],
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": None if git is None else git["commit"],
        "dirty": None if git is None else git["modified"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": not cuda,
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def table(checks: Sequence[Check]) -> str:
    """All checks, and how many passed."""
    words = {True: "ok", False: "FAILED", None: "left out"}
    rows = [
        [words[c.passed], c.part, c.name + (f" ({c.note})" if c.note else ""), f"{c.error:.3g}", f"{c.tolerance:.3g}",
         f"{c.seconds:.1f}"]
        for c in checks
    ]  # fmt: skip
    counts = ", ".join(f"{sum(c.passed is passed for c in checks)} {word}" for passed, word in words.items())
    return Table(["", "part", "check", "error", "tolerance", "s"], rows, num_text=3).plain() + f"\n{counts}"


@steady_terminal()
def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/gpu_check.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="file for all checks (gpu_check.json)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, by name, separated by commas (all)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds of the whole, shared out (480)")
    parser.add_argument("--dry-run", action="store_true", help="micro sizes on the CPU")
    parser.add_argument("--reference", action="store_true", help="make the CPU's figures that the demo is held against")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        part_in_this_process(given.child, given.lines, given.dry_run)
        return 0
    if given.reference:
        from tools.gpu.demo import write_reference  # the parts' modules are heavy

        with tempfile.TemporaryDirectory() as folder:
            write_reference(Path(folder))
        return 0
    names = [name for name in given.parts.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    began, checks, where = time.perf_counter(), [], facts(given.dry_run)
    for name in names:
        left = given.budget_s - (time.perf_counter() - began)
        print(f"{name}: at most {left:.0f} s are left", flush=True)
        if left <= 0:
            checks.append(Check(name, "the part comes to its end", math.nan, 0.0, 0.0, "the budget was spent before"))
        else:
            share = given.budget_s * PARTS[name][1] / BUDGET_S
            checks += part(name, where["dry_run"], min(left, share))
        content = {**where, "seconds": round(time.perf_counter() - began, 1), "checks": [c.entry() for c in checks]}
        given.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(checks))
    print(
        f"{given.out}: all checks" + (", of a dry run on a CPU: nothing is proved of CUDA" if where["dry_run"] else "")
    )
    return 1 if any(check.passed is False for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
