"""CUDA graphs of decoding steps: captured once per size, replayed from then on without a launch per
kernel.

The first graph of each size is compared with the steps that it replaces, bit for bit. Where one
differs, or cannot be captured, all steps run as they are; where memory runs out, those of that size
do. They keep the sizes that graphs would have: results do not depend on which processes replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol
from weakref import WeakSet

import torch
from torch import nn

NUM_CHECKED: Final = 2
"""Steps that a size's first graph and plain steps take from the same state; the second reads what
the first wrote.
"""

Step = Callable[[], torch.Tensor]
"""Takes a step and returns its logits ``[rows, vocabulary]``."""


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> object:
        """Do it again, with what its tensors hold now."""
        ...


Capture = Callable[[Callable[[], object]], Graph]
"""Records what a call does to the device's memory, without doing it."""


class Graphs:
    """Runs a step that reads and writes nothing but tensors that stay where they are.

    The first step of a size runs as it is, which also lets libraries set themselves up; the second
    is captured, and it and all later ones are replayed.

    Args:
        capture: :func:`capture_cuda`, or a test's stand-in.
        problem: why steps are not to be replayed at all; None where they are.
        free: gives back memory that is cached and not in use, before a capture is tried again.

    Attributes:
        problem: why steps are not, or no longer, replayed.
    """

    def __init__(
        self,
        capture: Capture,
        problem: str | None = None,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        self.problem = problem
        self._too_large: set[Hashable] = set()  # sizes that run as they are
        self._new_too_large: list[Hashable] = []
        self._capture = capture
        self._free = free
        self._graphs: dict[Hashable, Graph | None] = {}
        self._checked: set[Hashable] = set()

    def run(self, size: Hashable, step: Step, carried: Sequence[torch.Tensor]) -> None:
        """Take a step.

        Args:
            size: all that the step depends on beside the tensors' content, their addresses
                included.
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
        """Forget all graphs, whose tensors are no longer in use, and give back their memory."""
        self._graphs.clear()

    def pop_too_large(self) -> list[Hashable]:
        """Sizes whose graphs have not fitted into memory since the last call; their steps run as
        they are.
        """
        found, self._new_too_large = self._new_too_large, []
        return found

    def _captured(
        self,
        size: Hashable,
        step: Step,
        carried: Sequence[torch.Tensor],
    ) -> Graph | None:
        """The graph of a step; None where it does not fit into memory, or, with :attr:`problem`,
        where it is wrong.
        """
        graph, problem, is_full = self._attempt(size, step, carried)
        if is_full:
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
        """The graph, what is wrong, and whether memory ran out. Keeps no exception, whose frames
        hold memory.
        """
        logits: list[torch.Tensor] = []
        try:
            if size in self._checked:
                return self._capture(step), None, False
            graph = self._capture(lambda: logits.append(step()))
            wrong = _difference(graph, step, logits, carried)
        except Exception as error:  # whatever a library does that cannot be captured
            text = " ".join(str(error).split())[:200]
            return (
                None,
                f"capturing a step ended with {type(error).__name__}: {text}",
                _is_out_of_memory(error),
            )
        return (graph, None, False) if wrong is None else (None, wrong, False)


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
    """How replayed steps differ from plain ones; the tensors are left as they were.

    Args:
        logits: its last entry is where the captured step puts its logits.
    """
    before = [tensor.clone() for tensor in carried]

    def put_back() -> None:
        for tensor, old in zip(carried, before, strict=True):
            tensor.copy_(old)

    # Replays go first: had plain steps written the keys and values already, a graph that writes
    # none would pass.
    replayed, plain = [], []
    try:
        for _ in range(NUM_CHECKED):
            graph.replay()
            replayed += [logits[-1].clone(), *(tensor.clone() for tensor in carried)]
        put_back()
        for _ in range(NUM_CHECKED):
            plain += [step().clone(), *(tensor.clone() for tensor in carried)]
    finally:
        put_back()

    for i, (mine, true) in enumerate(zip(replayed, plain, strict=True)):
        if not torch.equal(
            mine.view(torch.uint8),
            true.view(torch.uint8),
        ):  # bits, as NaN is no equal of NaN
            number, part = divmod(i, 1 + len(carried))
            what = "state" if part else "logits"
            return f"a replayed step gives other {what} than the plain one (step {number + 1} of {NUM_CHECKED})"
    return None


_LIVE: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def capture_cuda(step: Callable[[], object]) -> Graph:
    """Capture a step that has run once before. One replay follows another, so all live captures
    share their memory.

    A pool of memory ends with its last graph, and torch refuses a later capture into it: that one
    gets a new pool. Other threads, such as the watchdog of NCCL, may use CUDA meanwhile.
    """
    graph, other = torch.cuda.CUDAGraph(), next(iter(_LIVE), None)
    pool = None if other is None else other.pool()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    _LIVE.add(graph)
    return graph


def free_cuda() -> None:
    """Give back memory that torch's allocator caches."""
    gc.collect()
    torch.cuda.empty_cache()


def can_be_captured(model: nn.Module) -> bool:
    """Return whether a step of the model never asks the device for a number.

    Rotary embeddings whose frequencies depend on the largest position (dynamic NTK, LongRoPE) do.
    """
    types = (getattr(module, "rope_type", None) for module in model.modules())
    names = [
        name for kind in types for name in (kind.values() if isinstance(kind, dict) else [kind])
    ]
    return not any("dynamic" in str(name) or name == "longrope" for name in names)


def uses_graphs(device: torch.device) -> bool:
    """Return whether steps of decoding are replayed here, of models that allow it; their shapes are
    then others.
    """
    return device.type == "cuda"
