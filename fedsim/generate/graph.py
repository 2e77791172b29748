"""CUDA graphs of decoding steps: captured once per size, replayed from then on without a launch per kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol
from weakref import WeakSet

import torch
from torch import nn

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.proved import is_proved


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> None:
        """Do it again, with what its tensors hold now."""
        ...


Capture = Callable[[Callable[[], None]], Graph]
"""Records what a call does to the device's memory, without doing it."""


class Graphs:
    """Runs a step that reads and writes nothing but tensors that stay where they are.

    The first step of a size runs as it is, which also lets libraries set themselves up; the second is captured, and it
    and all later ones are replayed.

    Args:
        capture: :func:`capture_cuda`, or a test's stand-in.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Graph | None] = {}

    def run(self, size: Hashable, step: Callable[[], None]) -> None:
        """Take a step.

        Args:
            size: all that the step depends on beside the tensors' content, their addresses included.
        """
        if size not in self._graphs:
            step()
            self._graphs[size] = None
            return
        graph = self._graphs[size]
        if graph is None:
            graph = self._graphs[size] = self._capture(step)
        graph.replay()

    def clear(self) -> None:
        """Forget all graphs, whose tensors are no longer in use, and give back their memory."""
        self._graphs.clear()


def graph_path(implementation: str) -> str:
    """What graphs over an attention implementation are called in :mod:`fedsim.proved`: "decode_graph/varlen"."""
    names = {implementation: name for name, implementation in IMPLEMENTATIONS.items()}
    return f"decode_graph/{names.get(implementation, implementation)}"


_LIVE: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def capture_cuda(step: Callable[[], None]) -> Graph:
    """Capture a step that has run once before. One replay follows another, so all live captures share their memory.

    A pool of memory ends with its last graph, and torch refuses a later capture into it: that one gets a new pool.
    """
    graph, other = torch.cuda.CUDAGraph(), next(iter(_LIVE), None)
    with torch.cuda.graph(graph, pool=None if other is None else other.pool()):
        step()
    _LIVE.add(graph)
    return graph


def can_be_captured(model: nn.Module) -> bool:
    """Whether a step of the model never asks the device for a number.

    Rotary embeddings whose frequencies depend on the largest position (dynamic NTK, LongRoPE) do.
    """
    types = (getattr(module, "rope_type", None) for module in model.modules())
    names = [name for kind in types for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return not any("dynamic" in str(name) or name == "longrope" for name in names)


def uses_graphs(device: torch.device, implementation: str) -> bool:
    """Whether steps of decoding are replayed here, of models that allow it; their shapes are then others.

    Args:
        implementation: transformers' name of the model's attention.
    """
    return device.type == "cuda" and is_proved(graph_path(implementation))
