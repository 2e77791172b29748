"""Memory that runs out, on a GPU or in RAM, as one error that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from fedsim.base.errors import MemoryFullError
from fedsim.base.journal import Journal
from fedsim.base.tables import byte_size

STAGE_KEYS: Final = {
    "safety filter": ("guard.batch_tokens", "guard.max_length", "local.micro_batch_size"),
    "making guard-": ("guard.batch_tokens", "guard.max_length", "local.micro_batch_size"),
    "local training": ("local.micro_batch_size", "local.max_length"),
    "constitutional AI": ("local.micro_batch_size", "cai.max_length"),
    "CAI conversations": ("eval.batch_size", "cai.max_new_tokens"),
    "making cai-": ("eval.batch_size", "cai.max_new_tokens"),
    "guard judges": ("guard.batch_tokens", "guard.max_length"),
    "evaluate": ("eval.batch_size", "eval.max_new_tokens", "guard.batch_tokens"),
    "making pretrained-evaluation": ("eval.batch_size", "eval.max_new_tokens"),
    "judge MT-Bench": ("eval.batch_size", "judge.max_new_tokens"),
}
"""Keys that decide the memory of a stage, most useful first, by how the stage's name in the journal begins."""

BUSY_SHARE: Final = 0.05
"""Share of a GPU that other processes hold, from which on they are named."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory has run out: on a GPU, or on the CPU, where torch says so in words alone."""
    if isinstance(error, MemoryFullError | MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA out of memory" in text)


def explained(error: BaseException, stage: str, device: torch.device | None = None) -> MemoryFullError:
    """The error in words: how much there is, who else holds it, and the keys to lower.

    Args:
        stage: name of the stage in the journal; "" where it is not known.
        device: a GPU; None takes the current one where the error is CUDA's, else the RAM.
    """
    if isinstance(error, MemoryFullError):
        return error
    keys = next((keys for begin, keys in STAGE_KEYS.items() if stage.startswith(begin)), ())
    advice = [f"lower {' or '.join(keys)}"] if keys else ["set model.dtype=bfloat16", "use a smaller model"]
    of_cuda = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)
    if device is None and of_cuda and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        where, busy = _gpu(device)
        advice = [*busy, *advice]
    else:
        where = "the machine's memory is full"
        advice.append("start fewer processes")
    said = " ".join(str(error).split())[:300]
    return MemoryFullError(
        f"{where} ({said}): {', '.join(advice)}; --check prints what each stage needs and values that fit"
    )


def _gpu(device: torch.device) -> tuple[str, list[str]]:
    """What the GPU holds, and advice where other processes hold a part of it."""
    name = f"GPU {device.index}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
    except RuntimeError:  # after some errors nothing can be asked any more
        return f"{name} is full", []
    others = total - free - own
    held = f"{name} is full: {byte_size(own)} of {byte_size(total)} are this process's"
    if others < BUSY_SHARE * total:
        return held, []
    return f"{held}, {byte_size(others)} others' and CUDA's own", [
        "end the other processes on this GPU (nvidia-smi lists them) or choose free GPUs with CUDA_VISIBLE_DEVICES"
    ]


@contextmanager
def explaining_memory(journal: Journal) -> Iterator[None]:
    """Turn an error of full memory inside the block into a :class:`MemoryFullError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        place = journal.place_of(error)
        found = explained(error, str(place.get("stage", "")))
        found.place = found.place or {"rank": journal.rank, **place}
        raise found from error
