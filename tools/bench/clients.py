"""Adapters of a round's clients, summed as fedsim does and as OpenFedLLM does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from fedsim.base.ranks import Term
from fedsim.federation.algorithms import FedAvg, RoundSums, ServerState
from fedsim.parallel.sums import Summer
from tools.bench.models import GPU
from tools.bench.stage import PAPER_LORA

ROWS = (200, 310, 150, 402, 250)  # of five clients: what they count


class Clients:
    """Adapters of five clients, as flat vectors and as OpenFedLLM's dicts of tensors of their own.

    Args:
        layers: of the model.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        config = GPU.config
        width = config["hidden_size"]
        narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
        rank = PAPER_LORA.r
        self.tensors = {
            f"layers.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in (
                ("q_proj.lora_A", (rank, width)),
                ("q_proj.lora_B", (width, rank)),
                ("v_proj.lora_A", (rank, width)),
                ("v_proj.lora_B", (narrow, rank)),
            )
        }
        self.size = sum(rows * columns for rows, columns in self.tensors.values())
        generator = torch.Generator(device).manual_seed(0)
        self.vectors = [torch.randn(self.size, generator=generator, device=device) * 1e-3 for _ in ROWS]
        self.dicts = [{key: part.clone() for key, part in self.views(vector).items()} for vector in self.vectors]
        self.state = ServerState(torch.zeros(self.size, device=device))

    @property
    def shapes(self) -> dict[str, int]:
        """For the rows."""
        return {"clients": len(ROWS), "numbers": self.size, "tensors": len(self.tensors)}

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A vector's tensors by name."""
        parts = vector.split([rows * columns for rows, columns in self.tensors.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.tensors.items(), parts, strict=True)}

    def sum(self, exact: bool, order: int = 1) -> torch.Tensor:
        """Σ n · vector."""
        terms = [Term(vector, float(n)) for vector, n in zip(self.vectors, ROWS, strict=True)][::order]
        (total,) = Summer(None, exact=exact, device=self.vectors[0].device).sum([terms], [self.size], len(terms))
        return total

    def round(self, exact: bool) -> ServerState:
        """The next global adapter."""
        return FedAvg().server_step(self.state, RoundSums(self.sum(exact), float(sum(ROWS)), None, len(ROWS)))


def dict_loop(dicts: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """OpenFedLLM's weighted mean (``federated_learning/fed_global.py``, ``global_aggregate``)."""
    total = sum(rows)
    return {key: sum([d[key] * n / total for d, n in zip(dicts, rows, strict=True)]) for key in dicts[0]}  # type: ignore[misc]


def scaffold_callback(model: Mapping[str, torch.Tensor], correction: Mapping[str, torch.Tensor], lr: float) -> None:
    """OpenFedLLM's ``SCAFFOLD_Callback.on_step_end`` without PEFT's work on names: copy, subtract, copy back."""
    values = copy.deepcopy(dict(model))
    for name in values:
        values[name] -= lr * correction[name]
    for name, value in values.items():
        model[name].copy_(value)
