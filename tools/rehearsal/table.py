"""The rehearsal's table: a line a phase, and where each loses time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from fedsim.base.tables import Table
from tools.rehearsal.measure import GIB, Measured, top
from tools.rehearsal.roofline import GPUS, KERNEL_S, REACHED

HEAD: Final = (
    *("phase", "tokens", "kernels", "GB", "MB/tok", "peak GiB", "of bound"),
    *(head for gpu in GPUS for head in (f"{gpu} ms", "floor", "share")),
)
LOSSES: Final = ("phase", "A100 ms outside bf16 products and attention, by module (kernels)")


def text(found: Mapping[str, Measured], versions: Mapping[str, str]) -> str:
    """Both tables with their legend for a terminal, at most 120 columns."""
    phases, losses = _tables(found)
    return "\n".join([*_legend(versions), "", phases.plain(), "", losses.plain()]) + "\n"


def page(content: Mapping[str, Any]) -> str:
    """The result page from the content of ``phases.json``."""
    names = [field.name for field in fields(Measured)]
    found = {phase: Measured(**{name: row[name] for name in names}) for phase, row in content["phases"].items()}
    phases, losses = _tables(found)
    parts = ["# Rehearsal of the CUDA path", " ".join(_legend(content["versions"])), PAGE_NOTE]
    return "\n\n".join([*parts, phases.markdown(), "## Where time is lost", losses.markdown()]) + "\n"


PAGE_NOTE: Final = (
    "[What a rehearsal shows and what it cannot](../performance.md#rehearsal-of-the-cuda-path). Columns: tokens of the "
    "phase, kernels that it launches, gigabytes that they move, megabytes per token, live memory at its peak and its "
    "share of the bound that `--check` prints; then for each GPU the roofline's time, the floor, and the floor's share."
)


def _legend(versions: Mapping[str, str]) -> list[str]:
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [
        "Roofline of Llama-3.1-8B's shapes, 32 layers, bf16, LoRA r 32 on q and v: no GPU has run anything.",
        f"Each operator on a fake device, one after the other: {REACHED['bf16']:.0%} of bf16's peak, "
        f"{REACHED['fp32']:.0%} of fp32's, {REACHED['bandwidth']:.0%} of the bandwidth,",
        f"{1e6 * KERNEL_S:g} µs at least. Floor: bf16 arithmetic at the peak, or weights and cache read once.",
        "Not in it: the host's time and collectives.",
        f"Versions: {names}. Made by `make rehearse`.",
    ]


def _tables(found: Mapping[str, Measured]) -> tuple[Table, Table]:
    """A line a phase, and where each phase loses time."""
    losses = [(name, _losses(measured)) for name, measured in found.items()]
    return Table(HEAD, [_row(name, measured) for name, measured in found.items()]), Table(LOSSES, losses, 2)


def _row(name: str, measured: Measured) -> list[str]:
    cells = [name, str(measured.tokens or "–"), f"{measured.kernels:,.0f}", f"{measured.num_bytes / 1e9:.1f}"]
    cells.append(f"{measured.num_bytes / 1e6 / measured.tokens:.1f}" if measured.tokens else "–")
    cells.append(f"{measured.peak / GIB:.1f}")
    cells.append(f"{measured.peak / measured.needed:.0%}" if measured.needed else "–")
    for gpu in GPUS:
        ms, floor = measured.ms[gpu], measured.floor_ms[gpu]
        cells += [f"{ms:.1f}", f"{floor:.1f}" if floor else "–", f"{floor / ms:.0%}" if floor else "–"]
    return cells


def _losses(measured: Measured) -> str:
    parts = [f"{name} {ms:.1f} ({measured.kernels_of[name]:.0f})" for name, ms in top(measured.lost_ms)]
    return ", ".join(parts)
