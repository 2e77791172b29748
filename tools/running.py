"""Runs that tools start as a user does, the rows' file of what was measured on them, and the result page of it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim.base.errors import ConfigError
from fedsim.base.version import git_state
from fedsim.config import load_config
from fedsim.config.command_line import DEFAULT
from fedsim.record.manifest import hardware, package_versions
from fedsim.study.bench_rows import StageResult

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "results"
RESULTS = ROOT / "tools" / "bench" / "results"
FOLDER = "operations"  # beside the benchmark's own rows, which are of single pieces of work
PACKAGES = ("torch", "transformers", "peft")
WRITTEN = ("tools/bench/results", "docs/results")  # by these tools, not what they measure


def command(num_ranks: int, words: Sequence[str]) -> list[str]:
    """``launch/run.py`` with ``words`` under plain python, or under torchrun where there are several ranks."""
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    return [*launcher, str(ROOT / "launch" / "run.py"), *words]


def environment() -> dict[str, str]:
    """This process's, with this very tree on the path, one thread a process, and no launcher's variables."""
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_words(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The words of a run: the config file (the demo's by default), ``overrides``, and what the user overrides again.

    Raises:
        ConfigError: two files are named, or the configuration is wrong.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"command line: one config file at most, not {len(files)}: {' '.join(files)}")
    file = Path(files[0]) if files else DEFAULT
    pairs = [*overrides, *(word for word in words if "=" in word)]
    load_config(file, pairs)  # a mistake ends the tool before a run is started
    return [str(file), *pairs]


def process_counts(text: str) -> list[int]:
    """``1,4`` as numbers.

    Raises:
        ConfigError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", text):
        raise ConfigError(f"--nproc {text}: must be numbers >= 1 separated by commas, such as 1,4")
    return [int(part) for part in text.split(",")]


def facts() -> dict[str, Any]:
    """Where, when and with what a tool measures."""
    git, machine = git_state(ROOT, WRITTEN), hardware()
    return {
        "device": machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"],
        "hardware": machine,
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": None if git is None else git["commit"] + (" (dirty)" if git["modified"] else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measured_on(of: StageResult) -> str:
    """``Measured on …`` from a result's facts."""
    where, versions = of.facts, of.facts["versions"]
    commit, _, dirty = (where["commit"] or "unknown").partition(" ")
    gpus = [gpu["name"] for gpu in where["hardware"]["gpus"]]
    machine = f"{where['hardware']['cores']} cores of {where['hardware']['cpu']}, " + (
        f"{len(gpus)} × {gpus[0]}" if gpus else "no GPU"
    )
    packages = ", ".join(f"{name} {versions[name]}" for name in PACKAGES)
    return f"Measured on {where['date'][:10]}: {machine}; {packages}, commit {commit[:10]} {dirty}".rstrip() + "."


def row_file(name: str, device: str) -> Path:
    """Where a tool's rows of a device lie."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / slug / FOLDER / f"{name}.json"


def write_rows(found: StageResult, asked: Path | None) -> None:
    """Write a tool's rows, to :func:`row_file` if nothing else is asked for.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = asked or row_file(found.stage, str(found.facts["device"]))
    try:
        found.write(path)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror}); give another path") from error
    print(f"written: {path}")


def newest_rows(name: str, results: Path = RESULTS) -> StageResult:
    """A tool's newest committed rows of any device.

    Raises:
        ConfigError: there are none.
    """
    found = [StageResult.read(path) for path in results.glob(f"*/{FOLDER}/{name}.json")]
    if not found:
        raise ConfigError(f"--page: no {FOLDER}/{name}.json in {results}; measure first, without --page")
    return max(found, key=lambda result: str(result.facts["date"]))


def write_page(path: Path, text: str) -> None:
    """Write a result page.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); mend its folder") from error
    print(f"written: {path}")
