"""Memory for long CPU vectors that is used again once no tensor refers to it.

An allocator gives blocks of more than 32 MiB back to the system when they are freed, so that the next vector of the
same length costs a page fault for every 4 KiB: 1 to 7 µs each, or 13 to 90 ms for the 54 MB of an 8B model's LoRA,
while one pass over it takes 3 ms. A round needs the same vectors as the one before.
"""

from __future__ import annotations

import math
import weakref
from functools import partial

import numpy as np
import torch

LEAST = 1 << 20  # bytes; shorter vectors are left to the allocator, which keeps such blocks
ALIGNMENT = 64  # bytes, as torch's own allocations have
UNIT = 1 << 21  # bytes, a huge page: vectors of nearly the same length share blocks

_free: dict[int, list[np.ndarray]] = {}  # blocks that no tensor refers to, by size in bytes


def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised vector, as ``torch.empty``.

    The memory stays with the process: as much as the long vectors of this module took at the same time.

    Args:
        size: how many numbers.

    Returns:
        ``[size]``; its memory is used again when neither it nor any view of it is left.
    """
    num_bytes = size * dtype.itemsize
    if device.type != "cpu" or num_bytes < LEAST:
        return torch.empty(size, dtype=dtype, device=device)
    capacity = math.ceil(num_bytes / UNIT) * UNIT
    blocks = _free.setdefault(capacity, [])
    block = blocks.pop() if blocks else np.empty(capacity + ALIGNMENT, dtype=np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    lease = block[start : start + num_bytes]  # an array of its own, which all tensors over it refer to
    weakref.finalize(lease, partial(blocks.append, block)).atexit = False
    return torch.from_numpy(lease).view(dtype)
