"""Shape and regularisation of a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSettings:
    """Shape and regularisation of a LoRA adapter (arXiv 2106.09685).

    Attributes:
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: probability, before the down projection.
        targets: names of the linear layers that get LoRA.
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
