"""Full memory, of a GPU or the machine, as one error that says what to change."""

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
"""Beginning of a stage's name in the journal → keys that decide its memory, most useful first."""

BUSY_SHARE: Final = 0.05
"""Least share of a GPU that other processes hold for them to be named."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means full memory of a GPU or of the machine."""
    if isinstance(error, MemoryFullError | MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # On a CPU torch says it only in the message.
    text = str(error)
    return "can't allocate memory" in text or "CUDA out of memory" in text


def explained(
    error: BaseException,
    stage: str,
    device: torch.device | None = None,
) -> MemoryFullError:
    """Explain the error: the memory's size, what other processes hold, and the keys to lower.

    Args:
        error: of full memory (:func:`is_out_of_memory`).
        stage: name of the stage in the journal; "" where it is not known.
        device: a GPU; None takes the current one where the error is CUDA's, else the RAM.
    """
    if isinstance(error, MemoryFullError):
        return error

    # Keys of the stage.
    advice = ["set model.dtype=bfloat16", "use a smaller model"]
    for begin, keys in STAGE_KEYS.items():
        if stage.startswith(begin):
            advice = [f"lower {' or '.join(keys)}"]
            break

    # The memory that is full: that of a GPU, or the machine's.
    of_cuda = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)
    if device is None and of_cuda and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        where, busy = _gpu(device)
        advice = [*busy, *advice]
    else:
        where = "the machine's memory is full"
        advice.append("start fewer processes")
    message = " ".join(str(error).split())[:300]
    advice.append("--check prints what each stage needs and values that fit")
    return MemoryFullError(f"{where} ({message}): {', '.join(advice[:-1])}; {advice[-1]}")


def _gpu(device: torch.device) -> tuple[str, list[str]]:
    """Describe what the GPU holds, with advice if other processes hold a part of it."""
    name = f"GPU {device.index}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
    except RuntimeError:  # after some errors CUDA answers no more queries
        return f"{name} is full", []
    others = total - free - reserved  # bytes
    held = f"{name} is full: {byte_size(reserved)} of {byte_size(total)} are this process's"
    if others < BUSY_SHARE * total:
        return held, []
    end = "end the other processes on this GPU (nvidia-smi lists them)"
    choose = "choose free GPUs with CUDA_VISIBLE_DEVICES"
    return f"{held}, {byte_size(others)} others' and CUDA's own", [f"{end} or {choose}"]


@contextmanager
def explaining_memory(journal: Journal) -> Iterator[None]:
    """Turn an error of full memory inside the block into a :class:`MemoryFullError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The stage at whose work the memory ran out decides the advice.
        place = journal.place_of(error)
        found = explained(error, str(place.get("stage", "")))
        found.place = found.place or {"rank": journal.rank, **place}
        raise found from error
