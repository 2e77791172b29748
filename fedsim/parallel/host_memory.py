"""Settings of the C library's allocator for a process on a CPU."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # glibc's malloc.h
MIB: Final = 1 << 20
SETTINGS: Final = {_MMAP_THRESHOLD: 32 * MIB, _TRIM_THRESHOLD: 512 * MIB, _TOP_PAD: 64 * MIB}
"""Bytes: tensors from 32 MiB on (glibc's most) are mapped; up to 512 MiB stay with the process."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed activations, which the next step or pass reuses.

    By default it gives the end of its heap back as soon as that is larger than twice the largest
    tensor freed so far; the kernel then zeroes every page again at its first use. ``MALLOC_…``
    variables of the environment are the user's choice and are left as they are.

    Returns:
        True if it is set; False under another C library, or if the user has made a choice.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    is_set = True
    for option, value in SETTINGS.items():
        is_set &= mallopt(option, value) == 1
    return is_set
