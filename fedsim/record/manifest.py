"""``manifest.json``: everything a run's figures depend on, so that they can be traced and repeated."""

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

    Args:
        config: the resolved configuration, nested or flat; its ``seed`` and ``parallel`` part are in it.
        inputs: data files by role, such as ``{"square": path}``; each gets its size and SHA-256.
        model_hashes: SHA-256 by role, such as ``{"base": ..., "guard": ...}``, as the caller computed them.
        attention: the attention backend of each model, and why it was taken, by role.
        num_ranks: processes of the run.
        devices: where each process computes, and what carries their sums.
        attackers: clients of each attack, by its key.
        pass_tokens: most tokens of a training pass by stage, where memory decides.

    A run that is resumed keeps the manifest it began with and adds an entry to its ``resumed`` list, in which ``moved``
    has the new path of each file or model that lies elsewhere.

    Raises:
        DataError: an input file cannot be read.
        CheckpointError: a resumed run's input or model is no longer the one that it began with, or its manifest is
            damaged.
    """
    path = directory / "manifest.json"
    now = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line(), "num_ranks": num_ranks}
    where = {"versions": versions(), "git": made_by()["git"], "hardware": hardware(), "attention": dict(attention)}
    where |= {"devices": dict(devices or {}), "pass_tokens": dict(pass_tokens or {})}
    if path.exists():
        manifest = read_manifest(path)
        check_unchanged(path, manifest, inputs, model_hashes)
        moved = _moved(manifest.get("config", {}), config)
        manifest.setdefault("resumed", []).append({**now, **where, **({"moved": moved} if moved else {})})
    else:
        manifest = {
            "started": now,
            **where,
            "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
            "seed": config.get("seed"),
            "inputs": {role: _file_entry(role, file) for role, file in inputs.items()},
            "models": dict(model_hashes),
            **({"attackers": {name: list(clients) for name, clients in attackers.items()}} if attackers else {}),
            "config": dict(config),
        }
    _replace(path, manifest)
    return path


def add_note(path: Path, text: str) -> None:
    """Add a line to the ``notes`` of the session that writes a manifest now (called on rank 0)."""
    manifest = read_manifest(path)
    session = manifest["resumed"][-1] if manifest.get("resumed") else manifest
    session.setdefault("notes", []).append(text)
    _replace(path, manifest)


def _replace(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest whole, or leave the old one."""
    new = path.with_suffix(".json.new")
    write_json(new, manifest)
    new.replace(path)


def versions() -> dict[str, str | None]:
    """Versions of Python, fedsim and the packages that figures depend on; None for one that is not installed."""
    found = {"python": platform.python_version(), "fedsim": fedsim.__version__, **package_versions(PACKAGES)}
    return {**found, "cuda": torch.version.cuda}


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed version of each package; None for one that is not there."""
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
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "system": platform.platform(),
    }


def command_line() -> str:
    """The command of this process as one could type it."""
    return shlex.join(sys.orig_argv)


def _file_entry(role: str, path: Path) -> dict[str, Any]:
    try:
        return {"path": str(path), "num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    except OSError as error:
        raise DataError(f"{role} file {path}: cannot be read ({error.strerror}); give the path of a file") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest with the parts that a resume needs.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        hashes = [entry["sha256"] for entry in manifest["inputs"].values()] + list(manifest["models"].values())
        whole = all(isinstance(digest, str) for digest in hashes) and isinstance(manifest.get("resumed", []), list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path}: is damaged, so that nobody can tell what the run began with; restore it, or start anew under "
            "another name (name=...)"
        )
    assert isinstance(manifest, dict)
    return manifest


def _moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Paths that a resumed run's nested configuration has changed, by key."""
    found = {}
    for key in (*file_roles(), *model_roles()):
        section, _, leaf = key.partition(".")
        old, new = before.get(section, {}).get(leaf), now.get(section, {}).get(leaf)
        if old != new:
            found[key] = new
    return found


def check_unchanged(
    path: Path, manifest: Mapping[str, Any], inputs: Mapping[str, Path], model_hashes: Mapping[str, str]
) -> None:
    """Compare the files and models of a run with those that it began with.

    Args:
        path: of the manifest.

    Raises:
        CheckpointError: one of them has another SHA-256.
    """
    now = {role: _file_entry(role, file)["sha256"] for role, file in inputs.items()} | dict(model_hashes)
    before = {role: entry["sha256"] for role, entry in manifest["inputs"].items()} | manifest["models"]
    changed = [role for role in before | now if before.get(role) != now.get(role)]
    if changed:
        raise CheckpointError(
            f"{path}: the {' and '.join(changed)} of this run changed since it began (SHA-256 differs); restore "
            "them, or start anew under another name (name=...)"
        )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
