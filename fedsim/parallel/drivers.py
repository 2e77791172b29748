"""NVIDIA drivers, the CUDA versions that they run, and torch's wheels: which build fits a machine.

The table :data:`BUILDS` is the only place with these facts; docs/gpu.md prints it. Sources: NVIDIA,
CUDA Compatibility, "Minor Version Compatibility", table 1 (smallest driver of each CUDA release
family); PyTorch, RELEASE.md, "PyTorch CUDA Support Matrix" of releases 2.11 to 2.14 (CUDA versions
that wheels are built with, and their GPU architectures).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VERSION_FILE: Final = Path("/proc/driver/nvidia/version")
"""Present where NVIDIA's kernel driver is loaded, in a container too."""

INDEX: Final = "https://download.pytorch.org/whl"

SMALLEST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
"""Smallest driver branch that runs a CUDA release family, by its major version."""


@dataclass(frozen=True)
class Build:
    """A CUDA build of torch.

    Attributes:
        tag: last part of the index's address, such as ``cu130``.
        cuda: CUDA version that it is built with.
        torch: releases of torch that have it, among those that fedsim allows.
        gpus: NVIDIA architectures that it has kernels for, oldest to newest.
    """

    tag: str
    cuda: str
    torch: str
    gpus: str

    @property
    def driver(self) -> int:
        """Smallest driver branch that it runs on."""
        return SMALLEST_DRIVER[int(self.cuda.partition(".")[0])]

    @property
    def index(self) -> str:
        """Address for ``pip install --index-url`` and for ``make demo TORCH_INDEX=``."""
        return f"{INDEX}/{self.tag}"


BUILDS: Final = (
    Build("cu130", "13.0", "2.11 and newer", "Turing, Ampere, Ada, Hopper, Blackwell"),
    Build("cu126", "12.6", "2.11 to 2.14", "Maxwell, Pascal, Volta, Turing, Ampere, Ada, Hopper"),
)
"""Newest CUDA version first; cu130 is what PyPI serves for the pinned torch."""


def fitting_build(driver: str) -> Build | None:
    """Newest build that runs on a driver; None if the driver is too old for all of them.

    Args:
        driver: its version, such as ``535.183.01``.
    """
    branch = int(driver.partition(".")[0])
    return next((build for build in BUILDS if branch >= build.driver), None)


def needed_driver(cuda: str) -> int | None:
    """Smallest driver branch for a CUDA version such as ``13.0``; None for an unknown family."""
    return SMALLEST_DRIVER.get(int(cuda.partition(".")[0]))


def installed_driver(file: Path = VERSION_FILE) -> str | None:
    """Version of the loaded NVIDIA driver, such as ``535.183.01``; None where none can be read."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text)
    if found is None:
        return None
    return found.group(1)


def table() -> str:
    """:data:`BUILDS` as a Markdown table: driver, index, CUDA, torch, GPUs."""
    rows = ["| driver | index | CUDA | torch | GPUs |", "| --- | --- | --- | --- | --- |"]
    upper = ""  # newest driver of the row, "" for no bound
    for build in BUILDS:
        driver = f"{build.driver} and newer"
        if upper:
            driver = f"{build.driver} to {upper}"
        rows.append(f"| {driver} | `{build.index}` | {build.cuda} | {build.torch} | {build.gpus} |")
        upper = f"{build.driver - 1}"
    rows.append(f"| older than {BUILDS[-1].driver} | none: update the driver | | | |")
    return "\n".join(rows)


def no_gpu_message(
    *,
    wanted: str,
    torch_version: str,
    cuda: str | None,
    driver: str | None,
    visible: str | None,
    torch_says: str,
) -> str:
    """Explain in one line why no GPU can be used, and how to fix it.

    Args:
        wanted: value of ``parallel.device``.
        torch_version: such as ``2.13.0+cu130``.
        cuda: CUDA version that torch is built with; None for a build without CUDA.
        driver: version of the loaded NVIDIA driver; None where there is none.
        visible: value of CUDA_VISIBLE_DEVICES; None where it is unset.
        torch_says: torch's own message.
    """
    on_cpu = "or set parallel.device=cpu to run on the CPU"
    said = ""
    if torch_says:
        said = f" (torch: {' '.join(torch_says.split())[:300]})"
    head = f"parallel.device={wanted}: "
    version = torch_version.partition("+")[0]

    # The build of torch that fits the driver, if there is one.
    build = None
    if driver is not None:
        build = fitting_build(driver)
    install = ""
    if build is not None:
        install = (  # how to get that build
            f"install the build that fits, `make demo TORCH_INDEX={build.index}` in a new .venv "
            f"(make clean), or `pip install --force-reinstall torch=={version} --index-url "
            f"{build.index}`"
        )

    # One case after another: torch without CUDA, no driver, a driver that is too old, all others.
    if cuda is None:
        if driver is None:
            what = f"torch {torch_version} is built without CUDA, and no NVIDIA driver is loaded"
            return f"{head}{what}; {_DRIVER}, {on_cpu}"
        what = f"NVIDIA driver {driver} is loaded, but torch {torch_version} is built without CUDA"
        return f"{head}{what}; {install or _TOO_OLD}, {on_cpu}"
    if driver is None:
        return (
            f"{head}torch {torch_version} is a CUDA build, but no NVIDIA driver is loaded{said}; "
            f"{_DRIVER}, {on_cpu} (configs/demo.yaml does)"
        )
    needed = needed_driver(cuda)
    if needed is not None and int(driver.partition(".")[0]) < needed:
        return (
            f"{head}NVIDIA driver {driver} is too old for torch {torch_version}: CUDA {cuda} needs "
            f"driver {needed} or newer{said}; update the driver, {install or _TOO_OLD}, {on_cpu}"
        )
    hidden = ""
    if visible is not None:
        hidden = f", CUDA_VISIBLE_DEVICES={visible!r}"
    return (
        f"{head}no GPU can be used with NVIDIA driver {driver} and torch "
        f"{torch_version}{hidden}{said}; see what `nvidia-smi -L` lists, correct or unset "
        "CUDA_VISIBLE_DEVICES, ask the job scheduler for GPUs, start a container with --gpus all, "
        f"{on_cpu}"
    )


_NEWEST, _OLDEST = BUILDS[0].driver, BUILDS[-1].driver
_TOO_OLD = f"no torch that fedsim runs on has a build for it: it takes driver {_OLDEST} or newer"
_WHEEL = f"{_NEWEST} or newer for the ordinary wheel"
_DRIVER = f"install NVIDIA's driver ({_WHEEL}), start a container with --gpus all"
