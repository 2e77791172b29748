"""``manifest.json``: all that a run's figures depend on, to trace and repeat them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fedsim
from fedsim.base.artefacts import file_digest, write_json
from fedsim.base.errors import CheckpointError, DataError
from fedsim.base.json_text import parse_json
from fedsim.base.version import made_by
from fedsim.config import file_roles, model_roles

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "datasets", "numpy")


def write_manifest(
    directory: Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    model_hashes: Mapping[str, str],
    attention: Mapping[str, str],
    *,
    num_ranks: int,
    devices: Mapping[str, Any] | None = None,
    attackers: Mapping[str, Sequence[int]] | None = None,
    pass_tokens: Mapping[str, int] | None = None,
) -> Path:
    """Write ``directory/manifest.json`` (called on rank 0) and return its path.

    A run that is resumed keeps the manifest it began with and adds an entry to its ``resumed``
    list, in which ``moved`` has the new path of each file or model that lies elsewhere.

    Args:
        config: the resolved configuration, nested.
        inputs: data files by role, such as ``{"square": path}``; each gets its size and SHA-256.
        model_hashes: SHA-256 by role, such as ``{"base": ..., "guard": ...}``.
        attention: the attention backend of each model, and why it was taken, by role.
        num_ranks: processes of the run.
        devices: where each process computes, and what carries their sums.
        attackers: clients of each attack, by its key.
        pass_tokens: most tokens of a training pass by stage, where memory decides.

    Raises:
        DataError: an input file cannot be read.
        CheckpointError: a resumed run's input or model is no longer the one that it began with, or
            its manifest is damaged.
    """
    path = directory / "manifest.json"
    # Facts of this session: when and how it was started, and with what it computes.
    now = {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "num_ranks": num_ranks,
    }
    where = {
        "versions": versions(),
        "git": made_by()["git"],
        "hardware": hardware(),
        "attention": dict(attention),
        "devices": dict(devices or {}),
        "pass_tokens": dict(pass_tokens or {}),
    }
    if path.exists():  # the run is resumed
        manifest = read_manifest(path)
        check_unchanged(path, manifest, inputs, model_hashes)
        # The files and models are those that the run began with; some may lie elsewhere.
        session: dict[str, Any] = {**now, **where}
        moved = _moved(manifest.get("config", {}), config)
        if moved:
            session["moved"] = moved
        manifest.setdefault("resumed", []).append(session)
    else:
        manifest = {
            "started": now,
            **where,
            "threads": {
                "torch": torch.get_num_threads(),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            },
            "seed": config.get("seed"),
            "inputs": {role: _file_entry(role, file) for role, file in inputs.items()},
            "models": dict(model_hashes),
        }
        if attackers:
            manifest["attackers"] = {name: list(clients) for name, clients in attackers.items()}
        manifest["config"] = dict(config)
    _replace(path, manifest)
    return path


def add_note(path: Path, text: str) -> None:
    """Add a line to the ``notes`` of the session that runs now (called on rank 0)."""
    manifest = read_manifest(path)
    # The last session's entry: the manifest's own where the run was never resumed.
    session = manifest
    if manifest.get("resumed"):
        session = manifest["resumed"][-1]
    session.setdefault("notes", []).append(text)
    _replace(path, manifest)


def _replace(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace a manifest by an atomic rename."""
    new = path.with_suffix(".json.new")
    write_json(new, manifest)
    new.replace(path)


def versions() -> dict[str, str | None]:
    """Versions of Python, fedsim, CUDA and the packages that figures depend on.

    None for one that is not installed.
    """
    return {
        "python": platform.python_version(),
        "fedsim": fedsim.__version__,
        **package_versions(PACKAGES),
        "cuda": torch.version.cuda,
    }


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed version of each package; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes and the GPUs with their memory."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on every system
        cores = len(os.sched_getaffinity(0))
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "system": platform.platform(),
    }


def command_line() -> str:
    """Command line of this process, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def _file_entry(role: str, path: Path) -> dict[str, Any]:
    """Path, size in bytes and SHA-256 of a file."""
    try:
        return {"path": str(path), "num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise DataError(f"{role} file {path}: {problem}; give the path of a file") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest with the parts that a resume needs.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        hashes = [entry["sha256"] for entry in manifest["inputs"].values()]
        hashes += manifest["models"].values()
        whole = all(isinstance(digest, str) for digest in hashes)
        whole = whole and isinstance(manifest.get("resumed", []), list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path}: is damaged, so that the run's inputs and models are unknown; restore it, or "
            "start again under another name (name=...)"
        )
    assert isinstance(manifest, dict)
    return manifest


def _moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Paths that differ in a resumed run's nested configuration: key → new path."""
    found = {}
    for key in (*file_roles(), *model_roles()):
        section, _, leaf = key.partition(".")
        old, new = before.get(section, {}).get(leaf), now.get(section, {}).get(leaf)
        if old != new:
            found[key] = new
    return found


def check_unchanged(
    path: Path,
    manifest: Mapping[str, Any],
    inputs: Mapping[str, Path],
    model_hashes: Mapping[str, str],
) -> None:
    """Compare the files and models of a run with those that it began with.

    Args:
        path: of the manifest.

    Raises:
        CheckpointError: one of them has another SHA-256.
    """
    # SHA-256 by role.
    now = {role: _file_entry(role, file)["sha256"] for role, file in inputs.items()}
    now |= model_hashes
    before = {role: entry["sha256"] for role, entry in manifest["inputs"].items()}
    before |= manifest["models"]
    changed = [role for role in before | now if before.get(role) != now.get(role)]
    if changed:
        raise CheckpointError(
            f"{path}: the {' and '.join(changed)} of this run changed since it began (SHA-256 "
            "differs); restore them, or start again under another name (name=...)"
        )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
