"""Assignment of prompts to parts of the world: pretraining, the SQuARe-like file or evaluation.

The part is a hash of the filled template, so two texts that ask the same thing can never fall into
different parts.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

Bucket = Literal["pretrain", "square", "evaluation"]
# Percent of all prompts.
BUCKET_SHARES: Final[dict[Bucket, int]] = {"pretrain": 60, "square": 20, "evaluation": 20}


def normalize(prompt: str) -> str:
    """Remove case, outer blanks and final punctuation (AdvBench's goals have no full stop)."""
    return " ".join(prompt.casefold().split()).rstrip(".?! ")


def bucket(prompt: str) -> Bucket:
    """The only part of the world that may contain this prompt."""
    digest = hashlib.blake2b(normalize(prompt).encode(), digest_size=8).digest()
    # A percentile, and the bucket whose share it falls into.
    place = int.from_bytes(digest, "big") % 100
    for name, share in BUCKET_SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("bucket shares must sum to 100")
