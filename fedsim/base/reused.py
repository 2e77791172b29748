"""Reused memory for long CPU vectors.

glibc returns blocks of more than 32 MiB to the system when they are freed, so the next vector of
the same length costs a page fault for every 4 KiB: 1 to 7 µs each, or 13 to 90 ms for the 54 MB of
an 8B model's LoRA, while one pass over it takes 3 ms. Every round needs vectors of the same lengths
as the round before.
"""

from __future__ import annotations

import math
import weakref
from functools import partial

import numpy as np
import torch

LEAST = 1 << 20  # bytes; shorter vectors come from torch's allocator, which keeps such blocks
ALIGNMENT = 64  # bytes, as torch's own allocations have
UNIT = 1 << 21  # bytes, a huge page: vectors of nearly the same length share blocks

_free: dict[int, list[np.ndarray]] = {}  # blocks without users, by size in bytes


def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised vector, as ``torch.empty``.

    The process keeps the memory: of each size, as many blocks as were in use at the same time.

    Args:
        size: how many numbers.

    Returns:
        ``[size]``; its memory is reused once neither it nor a view of it exists.
    """
    num_bytes = size * dtype.itemsize
    if device.type != "cpu" or num_bytes < LEAST:
        return torch.empty(size, dtype=dtype, device=device)

    # A free block of this size, or a new one.
    capacity = math.ceil(num_bytes / UNIT) * UNIT
    blocks = _free.setdefault(capacity, [])
    block = blocks.pop() if blocks else np.empty(capacity + ALIGNMENT, dtype=np.uint8)

    # Every tensor and array over the lease keeps it alive; the last one's end frees the block.
    start = -block.ctypes.data % ALIGNMENT
    lease = block[start : start + num_bytes]
    weakref.finalize(lease, partial(blocks.append, block)).atexit = False
    return torch.from_numpy(lease).view(dtype)
