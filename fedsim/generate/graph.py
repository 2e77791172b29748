"""CUDA graphs of decoding steps: captured once per size, then replayed in one launch.

The first graph of each size is compared with the steps that it replaces, bit for bit. Where one
differs, or cannot be captured, all steps run without graphs; where memory runs out, those of that
size do. They keep the sizes that graphs would have: results do not depend on which processes
replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol
from weakref import WeakSet

import torch
from torch import nn

NUM_CHECKED: Final = 2
"""Steps of a size's first graph that are compared with plain ones; the second reads the first's."""

Step = Callable[[], torch.Tensor]
"""A function that takes a step and returns its logits ``[rows, vocabulary]``."""


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> object:
        """Run it again on the present content of its tensors."""
        ...


Capture = Callable[[Callable[[], object]], Graph]
"""A function that records the kernels of a call without running them."""


class Graphs:
    """Runner of steps that read and write only tensors at fixed addresses.

    The first step of a size runs without a graph, which also lets libraries set themselves up; the
    second is captured, and it and all later ones are replayed.

    Args:
        capture: :func:`capture_cuda`, or a test's substitute.
        problem: the reason why no step is replayed; None where steps are.
        free: releases cached memory that is not in use, before a capture is tried again.

    Attributes:
        problem: the reason why no step is replayed, or none any more; None while steps are.
    """

    def __init__(
        self,
        capture: Capture,
        problem: str | None = None,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        self.problem = problem
        self._too_large: set[Hashable] = set()  # sizes that run without graphs
        self._new_too_large: list[Hashable] = []  # those of them that were not yet reported
        self._capture = capture
        self._free = free
        self._graphs: dict[Hashable, Graph | None] = {}  # by size; None after its first step
        self._checked: set[Hashable] = set()  # sizes whose first graph equals plain steps

    def run(self, size: Hashable, step: Step, carried: Sequence[torch.Tensor]) -> None:
        """Take a step, by replaying its graph where there is one.

        Args:
            size: all that the step depends on beside the tensors' content, their addresses
                included.
            step: takes it without a graph.
            carried: the tensors that it changes, apart from keys and values, which the same step
                writes again.
        """
        if self.problem is not None or size not in self._graphs or size in self._too_large:
            step()
            self._graphs.setdefault(size, None)
            return
        graph = self._graphs[size]
        if graph is None:
            graph = self._graphs[size] = self._captured(size, step, carried)
        if graph is None:
            step()
        else:
            graph.replay()

    def clear(self) -> None:
        """Drop all graphs, whose tensors are no longer in use, and release their memory."""
        self._graphs.clear()

    def pop_too_large(self) -> list[Hashable]:
        """Return and reset the sizes whose graphs did not fit into memory since the last call."""
        found, self._new_too_large = self._new_too_large, []
        return found

    def _captured(
        self,
        size: Hashable,
        step: Step,
        carried: Sequence[torch.Tensor],
    ) -> Graph | None:
        """Return the graph of a step.

        None where it does not fit into memory, or where it is wrong, which sets :attr:`problem`.
        """
        graph, problem, is_full = self._attempt(size, step, carried)
        if is_full:  # try once more with all cached memory released
            self._free()
            graph, problem, is_full = self._attempt(size, step, carried)
        if is_full:
            self._too_large.add(size)
            self._new_too_large.append(size)
        elif problem is not None:
            self.problem = problem
            self.clear()
        else:
            self._checked.add(size)
        return graph

    def _attempt(
        self,
        size: Hashable,
        step: Step,
        carried: Sequence[torch.Tensor],
    ) -> tuple[Graph | None, str | None, bool]:
        """Capture a step and compare its graph with plain steps, once per size.

        Keeps no exception: its frames hold memory.

        Returns:
            The graph, None if it is of no use; the problem, None without one; whether memory ran
            out.
        """
        logits: list[torch.Tensor] = []
        try:
            if size in self._checked:
                return self._capture(step), None, False
            graph = self._capture(lambda: logits.append(step()))
            wrong = _difference(graph, step, logits, carried)
        except Exception as error:  # of any type: a library may do what cannot be captured
            text = " ".join(str(error).split())[:200]
            problem = f"capturing a step ended with {type(error).__name__}: {text}"
            return None, problem, _is_out_of_memory(error)
        if wrong is not None:
            return None, wrong, False
        return graph, None, False


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory ran out, also where ending the broken capture raised another error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False


def _difference(
    graph: Graph,
    step: Step,
    logits: list[torch.Tensor],
    carried: Sequence[torch.Tensor],
) -> str | None:
    """Compare replayed steps with plain ones, bit for bit; the carried tensors are restored.

    Args:
        logits: its last entry is where the captured step puts its logits.

    Returns:
        The first difference in words; None if there is none.
    """
    before = [tensor.clone() for tensor in carried]

    def restore() -> None:
        for tensor, old in zip(carried, before, strict=True):
            tensor.copy_(old)

    # Replays go first: had plain steps written the keys and values already, a graph that writes
    # none would pass. After each step both lists hold its logits, then the carried tensors.
    replayed, plain = [], []
    try:
        for _ in range(NUM_CHECKED):
            graph.replay()
            replayed.append(logits[-1].clone())
            replayed.extend(tensor.clone() for tensor in carried)
        restore()
        for _ in range(NUM_CHECKED):
            plain.append(step().clone())
            plain.extend(tensor.clone() for tensor in carried)
    finally:
        restore()

    for i, (mine, true) in enumerate(zip(replayed, plain, strict=True)):
        # Compare bits: NaN does not equal NaN.
        if not torch.equal(mine.view(torch.uint8), true.view(torch.uint8)):
            number, part = divmod(i, 1 + len(carried))
            what = "state" if part else "logits"
            where = f"step {number + 1} of {NUM_CHECKED}"
            return f"a replayed step gives other {what} than the plain one ({where})"
    return None


_LIVE: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def capture_cuda(step: Callable[[], object]) -> Graph:
    """Capture a step that has run once before; all live captures share one memory pool.

    They may, since replays never overlap. A pool ends with its last graph, and torch refuses a
    later capture into it: that one gets a new pool.
    """
    graph, other = torch.cuda.CUDAGraph(), next(iter(_LIVE), None)
    pool = None if other is None else other.pool()
    # "thread_local": other threads, such as NCCL's watchdog, may use CUDA during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    _LIVE.add(graph)
    return graph


def free_cuda() -> None:
    """Release memory that torch's allocator caches."""
    gc.collect()
    torch.cuda.empty_cache()


def can_be_captured(model: nn.Module) -> bool:
    """Return whether a step of the model never reads a value back from the device.

    Rotary embeddings whose frequencies depend on the largest position (dynamic NTK, LongRoPE) do.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        names = list(kind.values()) if isinstance(kind, dict) else [kind]  # a dict: by layer type
        for name in names:
            if "dynamic" in str(name) or name == "longrope":
                return False
    return True


def uses_graphs(device: torch.device) -> bool:
    """Return whether decoding steps are replayed on a device, which changes their shapes."""
    return device.type == "cuda"
