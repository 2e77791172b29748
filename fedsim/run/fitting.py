"""Values of the configuration with which every stage fits into memory, found by trying them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from fedsim.base.tables import byte_size
from fedsim.config import Config, from_flat, to_flat
from fedsim.model.load import compute_dtype
from fedsim.model.shape import ModelShape
from fedsim.run.memory import Need
from fedsim.run.needs import memory_needs

Lever = tuple[str, int | str]
"""A key to halve, and its lower bound: a number, or the key whose value it may not undercut."""

LEVERS: Final[Mapping[str, tuple[Lever, ...]]] = {
    "local training": (("local.micro_batch_size", 1), ("local.max_length", 64)),
    "CAI (DPO)": (("local.micro_batch_size", 1), ("cai.max_length", 64)),
    "guard fine-tuning": (("local.micro_batch_size", 1), ("guard.max_length", 400)),
    "guard scoring": (("guard.batch_tokens", "guard.max_length"), ("guard.max_length", 400)),
    "generation": (("eval.batch_size", 1),),
    "judging": (("eval.batch_size", 1),),
}
"""Keys that may be lowered for each stage of :func:`memory_needs`, where that lowers its need.

Sizes of batches, which decide speed, come first; then lengths, at which rows are cut. In exact mode
smaller micro-batches mean more gradients, which for a large adapter can take more than the
activations that they save.
"""

GPUS: Final = (80, 40, 24)
"""Memory of common GPUs, in GiB."""

USABLE: Final = 0.96
"""Share of a GPU's memory that a process gets; the driver and CUDA's context take the rest."""


@dataclass(frozen=True)
class Fit:
    """Changes of the configuration that make a run fit.

    Attributes:
        changes: keys with their new values; empty where it fits as it is.
        unfit: a stage that is too large at the lowest values; None where all fit.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    unfit: Need | None = None

    def words(self) -> str:
        """``key=value …`` as on the command line."""
        if self.unfit is not None:
            size = byte_size(self.unfit.num_bytes)
            return f"does not fit: {self.unfit.stage} takes {size} at the lowest values"
        if not self.changes:
            return "fits as it is"
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


def fitting(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
    num_bytes: int,
) -> Fit:
    """Halve keys of :data:`LEVERS` until every stage needs at most ``num_bytes`` on one rank.

    The largest stage goes first, and a key is halved only if that lowers the stage's need. Values
    that fit need not be the largest that do.

    Args:
        shapes: sizes of the models in use, by role.
        num_bytes: memory of one rank.
    """
    changes: dict[str, Any] = {}
    while True:
        needs = memory_needs(config, shapes, num_ranks)
        largest = max(needs, key=lambda need: need.num_bytes)
        if largest.num_bytes <= num_bytes:
            return Fit(changes)
        lowered = _lowered(config, shapes, num_ranks, largest)
        if lowered is None:
            return Fit(changes, largest)
        key, config = lowered
        changes[key] = to_flat(config)[key]


def with_effective_keys(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
    needs: Sequence[Need],
) -> list[Need]:
    """The needs, each with the first key that lowers it; "" where none does."""
    found = []
    plain = {need.stage: need for need in memory_needs(config, shapes, num_ranks)}
    for need in needs:
        lowered = _lowered(config, shapes, num_ranks, plain[need.stage])
        key = "" if lowered is None else lowered[0]
        found.append(replace(need, key=key))
    return found


def _lowered(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
    need: Need,
) -> tuple[str, Config] | None:
    """Halve the first key of a stage that lowers the stage's need.

    Returns:
        The key, and the configuration with half its value; None if no key lowers the need.
    """
    flat = to_flat(config)
    for key, lowest in LEVERS[need.stage]:
        # Half the value, but not less than the key's lower bound.
        floor = int(flat[lowest]) if isinstance(lowest, str) else lowest
        value = max(floor, flat[key] // 2)
        if value >= flat[key]:
            continue

        # Keep it if the stage then needs less.
        changed = from_flat({**flat, key: value})
        for after in memory_needs(changed, shapes, num_ranks):
            if after.stage == need.stage and after.num_bytes < need.num_bytes:
                return key, changed
    return None


def fits_by_gpu(config: Config, shapes: Mapping[str, ModelShape], num_ranks: int) -> dict[str, Fit]:
    """Changes for each of :data:`GPUS`, with one rank on each GPU and nothing else there.

    Weights count in the type that ``model.dtype`` means on a GPU, wherever the check is made.
    """
    dtype = compute_dtype(config.model.dtype, torch.device("cuda"))
    on_gpu = {role: replace(shape, dtype=dtype) for role, shape in shapes.items()}
    found = {}
    for size in GPUS:
        num_bytes = int(USABLE * size * 2**30)
        found[f"{size} GB"] = fitting(config, on_gpu, num_ranks, num_bytes)
    return found
