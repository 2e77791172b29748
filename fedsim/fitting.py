"""Values of the configuration with which every stage fits into a given memory, found by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedsim.config import Config, from_flat, to_flat
from fedsim.model.memory import Need
from fedsim.model.shape import ModelShape
from fedsim.needs import memory_needs
from fedsim.record.tables import byte_size

Lever = tuple[str, int | str]
"""A key to halve, and how low it may go: a number, or the key whose value it may not undercut."""

LEVERS: Final[Mapping[str, tuple[Lever, ...]]] = {
    "local training": (("local.micro_batch_size", 1), ("local.max_length", 64)),
    "CAI (DPO)": (("local.micro_batch_size", 1), ("cai.max_length", 64)),
    "guard fine-tuning": (("local.micro_batch_size", 1), ("guard.max_length", 400)),
    "guard scoring": (("guard.batch_tokens", "guard.max_length"), ("guard.max_length", 400)),
    "generation": (("eval.batch_size", 1),),
    "judging": (("eval.batch_size", 1),),
}
"""What may be lowered for each stage of :func:`memory_needs`.

Sizes of batches, which decide speed, come first; then lengths, at which rows are cut.
"""

GPUS: Final = (80, 40, 24)
"""Memory of common GPUs, in GiB."""

USABLE: Final = 0.96
"""Share of a GPU's memory that a process gets; the driver and CUDA's context take the rest."""


@dataclass(frozen=True)
class Fit:
    """What makes a run fit.

    Attributes:
        changes: keys with their new values; empty where it fits as it is.
        unfit: a stage that is too large whatever is lowered; None where all fit.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    unfit: Need | None = None

    def words(self) -> str:
        """``key=value …`` as on the command line."""
        if self.unfit is not None:
            return f"does not fit: {self.unfit.stage} takes {byte_size(self.unfit.num_bytes)} at the lowest values"
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or "fits as it is"


def fitting(config: Config, shapes: Mapping[str, ModelShape], num_ranks: int, num_bytes: int) -> Fit:
    """Halve keys of :data:`LEVERS` until every stage needs at most ``num_bytes`` on one rank.

    The largest stage goes first. Values that fit need not be the largest that do.

    Args:
        shapes: sizes of the models in use, by role.
        num_bytes: memory of one rank.
    """
    flat = to_flat(config)
    changes: dict[str, Any] = {}
    while True:
        needs = memory_needs(from_flat(flat), shapes, num_ranks)
        largest = max(needs, key=lambda need: need.num_bytes)
        if largest.num_bytes <= num_bytes:
            return Fit(changes)
        lever = next((lever for lever in LEVERS[largest.stage] if flat[lever[0]] > _floor(lever, flat)), None)
        if lever is None:
            return Fit(changes, largest)
        key = lever[0]
        flat[key] = changes[key] = max(_floor(lever, flat), flat[key] // 2)


def _floor(lever: Lever, flat: Mapping[str, Any]) -> int:
    lowest = lever[1]
    return int(flat[lowest]) if isinstance(lowest, str) else lowest


def fits_by_gpu(config: Config, shapes: Mapping[str, ModelShape], num_ranks: int) -> dict[str, Fit]:
    """What to change for each of :data:`GPUS`, with one rank on each GPU and nothing else there."""
    return {f"{size} GB": fitting(config, shapes, num_ranks, int(USABLE * size * 2**30)) for size in GPUS}
