"""One line with the place, date and versions of the runs of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.base.version import commit_of

PACKAGES = ("torch", "transformers", "peft", "fedsim")


def measured_on(manifests: Sequence[Mapping[str, Any]]) -> str:
    """State the date, machine and versions of runs; what differs between them is listed.

    Args:
        manifests: of the runs, at least one.

    Returns:
        ``Measured on DATE: MACHINE; runs of N process(es); VERSIONS, commit …``.
    """
    # Days, as YYYY-MM-DD.
    dates = sorted({manifest["started"]["utc"][:10] for manifest in manifests})
    when = dates[0]
    if len(dates) > 1:
        when = f"{dates[0]} to {dates[-1]}"
    machines = _distinct(_machine(manifest["hardware"]) for manifest in manifests)
    versions = _distinct(_versions(manifest["versions"]) for manifest in manifests)
    processes = _distinct(str(manifest["started"]["num_ranks"]) for manifest in manifests)
    commits = _distinct(commit_of(manifest) for manifest in manifests)
    runs = f"runs of {processes} process(es); {versions}, commit {commits}"
    return f"Measured on {when}: {machines}; {runs}."


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = [gpu["name"] for gpu in hardware["gpus"]]
    accelerators = "no GPU"
    if gpus:
        accelerators = f"{len(gpus)} × {gpus[0]}"
    return f"{hardware['cores']} cores of {hardware['cpu']}, {accelerators}"


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in PACKAGES)


def _distinct(values: Iterable[str]) -> str:
    """Join values, each once, in their order."""
    return " and ".join(dict.fromkeys(values))
