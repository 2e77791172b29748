"""Which CUDA paths a committed GPU correctness row has shown right; the others are off under ``auto``.

The list is ``kernels/proved.json``. A benchmark on a GPU that first compares a path with its reference writes the entry
together with its row; nobody writes one by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

LIST = Path(__file__).parent / "kernels" / "proved.json"


@dataclass(frozen=True)
class Proof:
    """One entry of the list.

    Attributes:
        path: name of the CUDA path, such as "accumulate_triton", or "decode_graph/varlen" for graphs over a backend.
        device: the GPU's name.
        torch: torch's version.
        date: day of the comparison, YYYY-MM-DD.
        commit: the commit that was compared.
        max_relative_error: largest ‖out − reference‖ / ‖reference‖ found.
        row: the row's file, relative to the repository's root.
    """

    path: str
    device: str
    torch: str
    date: str
    commit: str
    max_relative_error: float
    row: str


@cache
def proofs() -> tuple[Proof, ...]:
    """All entries."""
    return tuple(Proof(**entry) for entry in json.loads(LIST.read_text(encoding="utf-8")))


def is_proved(path: str) -> bool:
    """Whether the CUDA path of this name has been shown right on a GPU, with the installed torch's major.minor.

    Another torch may take other code below the same name: what one has no argument for, the next one's kernel does.
    """
    return any(proof.path == path and release(proof.torch) == release(torch.__version__) for proof in proofs())


def release(version: str) -> tuple[str, ...]:
    """Major and minor number: ("2", "11") of "2.11.0+cu130"."""
    return tuple(version.split(".")[:2])
