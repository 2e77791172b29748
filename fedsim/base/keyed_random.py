"""Keyed randomness: every draw comes from a key, never from a generator's history.

A key is ``(seed, purpose, *place)``, such as ``(7, "cohort", round_idx)`` or ``(7, "dropout",
round_idx, client, step, micro_batch)``. Equal keys give equal draws on every rank, in any order and
after a resume; different keys give independent streams (BLAKE2b of the key seeds a Philox counter
generator).
"""

from __future__ import annotations

import hashlib

import numpy as np

KeyPart = int | str


def derive(seed: int, purpose: str, *place: KeyPart) -> int:
    """A 63-bit integer that depends on every part of the key and on nothing else."""
    # With their types, so that the parts 1 and "1" make different keys.
    parts = [f"{type(part).__name__}:{part}" for part in place]
    text = "\x1f".join([str(seed), purpose, *parts])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, *place: KeyPart) -> np.random.Generator:
    """A NumPy generator that starts at the key's own stream."""
    return np.random.Generator(np.random.Philox(key=derive(seed, purpose, *place)))


def permutation(num: int, seed: int, purpose: str, *place: KeyPart) -> np.ndarray:
    """A random order of ``range(num)`` (int64, shape ``[num]``) that belongs to the key."""
    return generator(seed, purpose, *place).permutation(num)
