"""The calls of the first session on a GPU: which parts each has, and how many seconds each part gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Part:
    """A piece of a call, which runs in a process of its own.

    Attributes:
        module: of tools.gpu, with a function ``run(setting, report)``.
        share_s: seconds that it is expected to need at most; what one does not use, the later ones get.
        argument: given to ``run`` too; "" gives none.
    """

    module: str
    share_s: float
    argument: str = ""


@dataclass(frozen=True)
class Call:
    """One command.

    Attributes:
        limit_s: seconds of the whole, all results written.
        parts: by name, in their order.
        extra: parts that run where they are asked for by name alone.
        about: for the help.
    """

    limit_s: float
    parts: dict[str, Part]
    about: str
    extra: tuple[str, ...] = ()


def _stages(**shares: float) -> dict[str, Part]:
    return {name: Part("bench", share, name) for name, share in shares.items()}


# Estimates for one H200 at 8B, by the rehearsal's roofline and launches: 15 to 25 s of each part are imports, the
# first use of CUDA and a model of 16 GB drawn on the GPU.
CALLS: Final[dict[str, Call]] = {
    "check": Call(
        420,
        {
            "questions": Part("questions", 60),
            "fused": Part("fused", 50),
            "sums": Part("sums", 25),
            "shapes": Part("shapes", 110),
            "tiny": Part("tiny", 100),
            "memory": Part("memory", 60),
            "demo": Part("demo", 150),
        },
        "whether the CUDA paths are right, and what only a GPU can answer",
        extra=("demo",),
    ),
    "whole": Call(
        400,
        {"run": Part("whole", 280), "steps": Part("steps", 105)},
        "a whole 8B run of configs/paper at small counts, and its steps under a profiler",
    ),
    "bench": Call(
        380,
        _stages(attention=30, local_step=85, cai_iteration=110, guard=105, aggregation=35),
        "the benchmark's stages at 8B, but for generation",
    ),
    "generation": Call(420, _stages(generation=405), "the benchmark's stage of generation at 8B"),
}

RESERVE_S: Final = 8.0
"""Of a call, for packing what its parts left."""


def chosen(call: Call, names: str) -> dict[str, Part]:
    """Parts by name, as a command line gives them; "" is all but the extra ones.

    Raises:
        ValueError: there is no such part.
    """
    wanted = [name for name in names.split(",") if name] or [name for name in call.parts if name not in call.extra]
    if unknown := [name for name in wanted if name not in call.parts]:
        raise ValueError(f"no part {', '.join(unknown)}; choose from {', '.join(call.parts)}")
    return {name: call.parts[name] for name in wanted}


def part_limit(left_s: float, shares: list[float]) -> float:
    """Seconds of the next part, whose share is the first: one that is alone, or the last, gets all that is left."""
    return left_s * shares[0] / sum(shares)
