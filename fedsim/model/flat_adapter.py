"""All LoRA tensors of one adapter in one contiguous fp32 buffer.

PEFT's parameters and their gradients are views into the buffer, so that loading a start point, a
delta, a correction, a robust rule, a checkpoint and an all-reduce are each one operation on one
vector.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedsim.base import keyed_random
from fedsim.base.errors import ModelError
from fedsim.base.tensor_file import write_tensors


@dataclass(frozen=True)
class Slot:
    """Name, shape and place of one tensor in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """One past its last number."""
        return self.start + math.prod(self.shape)


class FlatAdapter:
    """The trainable LoRA parameters of a PEFT model as one vector.

    Attributes:
        values: ``[size]`` in the parameters' dtype, fp32 but in tests; the parameters of the model
            are views of it.
        grad: ``[size]``; autograd accumulates into views of it.
        slots: name, shape and place of each tensor, in the model's order.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert named and all("lora_" in n for n, _ in named), "only LoRA parameters are trainable"

        # Lay the tensors out one behind the other.
        size = 0
        slots = []
        for name, parameter in named:
            slots.append(Slot(name, tuple(parameter.shape), size))
            size = slots[-1].stop
        self.slots = tuple(slots)

        # Move values and gradients into the two vectors [size]; the parameters become views.
        first = named[0][1]
        self.values = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.values)
        for (_, parameter), slot in zip(named, self.slots, strict=True):
            self._view(self.values, slot).copy_(parameter.data)
            parameter.data = self._view(self.values, slot)
            parameter.grad = self._view(self.grad, slot)

    @property
    def size(self) -> int:
        """Number of values of the adapter."""
        return self.values.numel()

    def load(self, vector: torch.Tensor) -> None:
        """Make ``vector`` (fp32 ``[size]``, any device) the model's adapter."""
        shape = tuple(vector.shape)
        assert shape == (self.size,), f"adapter has {self.size} numbers, vector {shape}"
        self.values.copy_(vector)

    def copy(self) -> torch.Tensor:
        """The adapter's current values, detached from the model."""
        return self.values.clone()

    def initial(self, seed: int) -> torch.Tensor:
        """Draw PEFT's default start: A uniform in ±1/√in (Kaiming, a = √5), B zero.

        Each tensor is drawn from its own key. The adapted model equals the base model exactly.

        Returns:
            fp32 ``[size]``, on the model's device.
        """
        vector = torch.zeros(self.size, dtype=torch.float32)
        for slot in self.slots:
            if "lora_A" in slot.name:
                bound = 1.0 / math.sqrt(slot.shape[-1])  # [r, in]
                random = keyed_random.generator(seed, "lora_init", slot.name)
                draws = random.uniform(-bound, bound, size=slot.shape)
                self._view(vector, slot).copy_(torch.from_numpy(draws))
        return vector.to(self.values.device)

    def save(self, folder: Path, vector: torch.Tensor) -> None:
        """Write ``vector`` in PEFT's format: adapter_config.json and adapter_model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._peft_tensors(vector)
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})

        # PEFT's settings, with a set of targets in a fixed order.
        settings = self.model.peft_config["default"].to_dict()
        settings["inference_mode"] = True
        settings["target_modules"] = sorted(settings["target_modules"])
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        for file in folder.iterdir():  # to disk
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def read(self, folder: Path) -> torch.Tensor:
        """Read the vector of an adapter that :meth:`save` or PEFT wrote.

        Returns:
            fp32 ``[size]``, on the model's device.

        Raises:
            ModelError: a missing or damaged file, or tensors of other names or shapes.
        """
        path = folder / "adapter_model.safetensors"
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            problem = f"{path}: cannot be read ({error})"
            raise ModelError(f"{problem}; give a PEFT adapter directory") from error

        # Names and shapes have to be those of this model.
        vector = torch.zeros(self.size, dtype=torch.float32)
        wanted = self._peft_tensors(vector)
        if _shapes(tensors) != _shapes(wanted):
            sizes = f"{len(tensors)} tensors, the model's has {len(wanted)}"
            problem = f"{path}: is an adapter of another shape ({sizes})"
            raise ModelError(f"{problem}; use the same base model, rank and targets")
        for slot in self.slots:
            name = _peft_name(slot.name)
            tensor = tensors[name]
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                problem = f"{path}: {name} holds other than finite numbers"
                raise ModelError(f"{problem}; save the adapter again")
            self._view(vector, slot).copy_(tensor)
        return vector.to(self.values.device)

    def _peft_tensors(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies of the tensors of ``vector`` on the CPU, by PEFT's names."""
        vector = vector.detach().cpu()
        return {_peft_name(slot.name): self._view(vector, slot).clone() for slot in self.slots}

    @staticmethod
    def _view(vector: torch.Tensor, slot: Slot) -> torch.Tensor:
        return vector[slot.start : slot.stop].view(slot.shape)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _peft_name(parameter_name: str) -> str:
    """Name in PEFT's file: ``….lora_A.weight`` of parameter ``….lora_A.default.weight``."""
    return parameter_name.replace(".default.", ".")
