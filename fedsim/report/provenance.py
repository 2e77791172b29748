"""One line with the place, date and versions of the runs of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.base.version import commit_of

PACKAGES = ("torch", "transformers", "peft", "fedsim")


def measured_on(manifests: Sequence[Mapping[str, Any]]) -> str:
    """``Measured on DATE: MACHINE; VERSIONS, commit …`` from the runs' manifests; what differs between them is listed.

    Args:
        manifests: at least one.
    """
    dates = sorted({m["started"]["utc"][:10] for m in manifests})
    machines = _each(_machine(m["hardware"]) for m in manifests)
    versions = _each(", ".join(f"{name} {m['versions'][name]}" for name in PACKAGES) for m in manifests)
    processes = _each(str(m["started"]["num_ranks"]) for m in manifests)
    commits = _each(commit_of(m) for m in manifests)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Measured on {when}: {machines}; runs of {processes} process(es); {versions}, commit {commits}."


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = [gpu["name"] for gpu in hardware["gpus"]]
    found = f"{len(gpus)} × {gpus[0]}" if gpus else "no GPU"
    return f"{hardware['cores']} cores of {hardware['cpu']}, {found}"


def _each(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))
