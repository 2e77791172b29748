"""One call on a GPU: its parts one after the other, each in a process of its own that is ended when its time is up.

Everything comes back in three files of one folder, which are rewritten as parts go on, so that a call that is itself
ended leaves what it had: ``CALL.json`` (facts, checks, figures), ``CALL.tar.gz`` (rows, logs and metrics) and
``CALL.log`` (what the parts printed).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from fedsim.base.tables import Table
from fedsim.base.version import git_state
from fedsim.record.manifest import hardware, package_versions
from tools.gpu import without
from tools.gpu.calls import CALLS, RESERVE_S, Part, part_limit
from tools.gpu.report import Check, Report, read_lines

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("torch", "transformers", "peft", "triton", "numpy", "tokenizers", "safetensors", "flash-attn",
                   "datasets", "trl", "deepspeed", "wandb", "matplotlib")  # fmt: skip
LARGEST: Final = 12 * 2**20  # bytes of a file that is brought back
WEIGHTS: Final = ".safetensors"  # files that are not
REWRITE_S: Final = 10.0  # between two times that a running part's results are written
END: Final = "the part comes to its end"

CHILD: Final = [sys.executable, "-m", "tools.gpu.child"]


@dataclass
class PartResult:
    """What became of a part.

    Attributes:
        status: running, ok, failed (it broke off, or a check failed), stopped (its time was up) or not begun.
        seconds: that it took.
        limit_s: that it was given.
        message: why it is not ok.
        report: what it found.
    """

    status: str = "not begun"
    seconds: float = 0.0
    limit_s: float = 0.0
    message: str = ""
    report: Report = field(default_factory=lambda: Report(""))

    def entry(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "limit_s": round(self.limit_s, 1),
            "message": self.message,
            "figures": self.report.figures,
            "checks": [check.entry() for check in self.report.checks],
        }


class Session:
    """A call under way.

    Args:
        name: of the call.
        parts: of it that run.
        out: folder for the results.
        limit_s: of the whole.
        dry: micro sizes on the CPU.
        commit: of the tree, where it is no clone.
    """

    def __init__(
        self, name: str, parts: dict[str, Part], out: Path, limit_s: float, dry: bool, commit: str | None
    ) -> None:
        self.began = time.monotonic()
        self.name = name
        self.parts = parts
        self.out = out
        self.limit_s = limit_s
        self.commit = commit
        self.facts = facts(dry, commit)
        self.dry = bool(self.facts["dry_run"])
        self.results = {part: PartResult() for part in parts}
        self.too_large: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds for parts."""
        return self.limit_s - RESERVE_S - (time.monotonic() - self.began)

    def run(self) -> int:
        """Run all parts; the exit status: 1 unless all are ok."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._file("log").write_bytes(b"")
        with tempfile.TemporaryDirectory() as folder, _ended_in_order():
            work = Path(folder)
            try:
                for name in self.parts:
                    self._part(name, work / name)
                    self._pack(work)
            finally:
                for result in self.results.values():
                    if result.status == "running":
                        result.status, result.message = "stopped", "the call was ended"
                self._pack(work)
                self._write()
        print(self.table(), flush=True)
        return 0 if all(result.status == "ok" for result in self.results.values()) else 1

    def _part(self, name: str, work: Path) -> None:
        """Run a part until it ends or its time is up."""
        result, names = self.results[name], list(self.parts)
        shares = [self.parts[other].share_s for other in names[names.index(name) :]]
        result.limit_s = part_limit(self.left_s, shares)
        if result.limit_s < 1:
            result.message = "the call's time was up before"
            return
        print(f"{name}: at most {result.limit_s:.0f} s", flush=True)
        work.mkdir()
        (work / "keep").mkdir()
        result.status, began = "running", time.monotonic()
        with self._file("log").open("ab") as log:
            log.write(f"--- {name}\n".encode())
            log.flush()
            printed = log.tell()
            process = self._start(name, work, began + result.limit_s, log)
            try:
                written = began
                while (status := process.poll()) is None and time.monotonic() < began + result.limit_s:
                    time.sleep(0.1)
                    if time.monotonic() - written > REWRITE_S:
                        result.report, written = read_lines(work / "lines", name), time.monotonic()
                        self._write()
            finally:
                _end_all(process)
                result.report = read_lines(work / "lines", name)
                result.seconds = time.monotonic() - began
        self._judge(name, status, printed)
        self._write()
        print(f"{name}: {result.status} after {result.seconds:.0f} s {result.message}".rstrip(), flush=True)

    def _start(self, name: str, work: Path, ends_at: float, log: Any) -> subprocess.Popen[bytes]:
        commit = [] if self.commit is None else ["--commit", self.commit]
        options = ["--work", str(work), "--ends-at", str(ends_at), *commit, *(["--dry-run"] if self.dry else [])]
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", **os.environ}
        environment["PYTHONPATH"] = str(ROOT)
        if self.dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "", without.VARIABLE: ",".join(without.PACKAGES)}
        return subprocess.Popen(
            [*CHILD, self.name, name, *options],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # ended as a whole; a session of its own could outlive this one
        )

    def _judge(self, name: str, status: int | None, printed: int) -> None:
        """Status and message of a part that has ended."""
        result = self.results[name]
        failed = [check for check in result.report.checks if check.passed is False]
        result.status = "failed"
        if status is None:
            result.status, why = "stopped", f"stopped after {result.limit_s:.0f} s, its time"
        elif status != 0:
            with self._file("log").open("rb") as log:
                log.seek(printed)
                last = log.read().decode(errors="replace").strip().splitlines()[-1:]
            why = f"exit status {status}: {' '.join(last)[:300]}"
        elif not result.report.checks and not result.report.figures:
            why = "it found nothing"
        elif failed:
            result.message = f"{len(failed)} checks failed"
            return
        else:
            result.status = "ok"
            return
        result.message = why
        result.report.checks.append(Check(name, END, float("nan"), 0.0, result.seconds, why))

    def _file(self, kind: str) -> Path:
        return self.out / f"{self.name}.{kind}"

    def _write(self) -> None:
        """Rewrite the JSON file."""
        content = {
            **self.facts,
            "call": self.name,
            "seconds": round(time.monotonic() - self.began, 1),
            "limit_s": self.limit_s,
            "parts": {name: result.entry() for name, result in self.results.items()},
            "not_brought_back": self.too_large,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        _replace(self._file("json"), text.encode())

    def _pack(self, work: Path) -> None:
        """Rewrite the archive of what parts keep, as ``PART/FILE``."""
        self.too_large = []
        new = work / "archive"
        with tarfile.open(new, "w:gz") as archive:
            for name in self.parts:
                folder = work / name / "keep"
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    place = f"{name}/{path.relative_to(folder).as_posix()}"
                    if path.stat().st_size > LARGEST:
                        self.too_large.append(place)
                    elif path.suffix != WEIGHTS:
                        archive.add(path, place)
        _replace(self._file("tar.gz"), new.read_bytes())

    def table(self) -> str:
        """All checks and figures, and what became of the parts."""
        words = {True: "ok", False: "FAILED", None: "left out"}
        checks = [check for result in self.results.values() for check in result.report.checks]
        rows = [
            [words[c.passed], c.part, c.name + (f" ({c.note})" if c.note else ""), f"{c.error:.3g}",
             f"{c.tolerance:.3g}", f"{c.seconds:.1f}"]
            for c in checks
        ]  # fmt: skip
        lines = [Table(["", "part", "check", "error", "tolerance", "s"], rows, num_text=3).plain()] if rows else []
        for name, result in self.results.items():
            lines += [f"{name}: {figure}: {value}" for figure, value in result.report.figures.items()]
        lines += [f"{name}: {r.status}, {r.seconds:.0f} s {r.message}".rstrip() for name, r in self.results.items()]
        counts = ", ".join(f"{sum(c.passed is passed for c in checks)} {word}" for passed, word in words.items())
        whole = f"{self._file('json')}: {counts}"
        return "\n".join([*lines, whole + (", of a dry run on a CPU: nothing is proved of CUDA" if self.dry else "")])


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End a part and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM leaves the block as an error does, so that its part is ended and results are written."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def facts(dry: bool, commit: str | None = None) -> dict[str, Any]:
    """Where, when and with what a call is made.

    Args:
        commit: of a tree that is no clone; a clone tells its own.
    """
    git = git_state(ROOT)
    cuda = torch.cuda.is_available() and not dry
    return {
        "device": torch.cuda.get_device_name(0) if cuda else hardware()["cpu"],
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": git["commit"] if commit is None and git is not None else commit,
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


def run_call(
    name: str, parts: dict[str, Part], out: Path, *, limit_s: float | None = None, dry: bool, commit: str | None
) -> int:
    """Run a call; the exit status."""
    return Session(name, parts, out, CALLS[name].limit_s if limit_s is None else limit_s, dry, commit).run()


def summary(names: Sequence[str] = tuple(CALLS)) -> str:
    """The calls with their parts and seconds, for the help."""
    lines = []
    for name in names:
        call = CALLS[name]
        parts = ", ".join(part + (" (by --parts alone)" if part in call.extra else "") for part in call.parts)
        lines.append(f"  {name:<11} {call.limit_s:.0f} s  {call.about}\n{'':20}parts: {parts}")
    return "\n".join(lines)
