"""Whose work an operator is, counted on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.rehearsal.roofline import Labels, Roofline  # noqa: E402


def test_work_belongs_to_the_module_that_does_it_forward_and_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
    x = torch.ones(3, 4)
    labels = Labels(model, lambda name, module: {"0": "product", "1": "silu"}.get(name))
    with Roofline("cpu", labels) as roofline:
        loss = model(x).sum()
        loss.backward()
    found = roofline.counted.kernels_of
    assert found["silu"] >= 2 and found["product"] >= 3 and found[Labels.OUTSIDE] >= 2


def test_an_exception_inside_a_module_leaves_the_outer_ones_label() -> None:
    class Raises(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Raises()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                self.inner(x)
            except ValueError:
                return x + 1
            return x

    outer = Outer()
    labels = Labels(outer, lambda name, module: name or "outer")
    with Roofline("cpu", labels):
        outer(torch.ones(2))
    assert labels.current() == Labels.OUTSIDE
