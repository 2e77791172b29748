"""Peaks of devices: the data sheets' lines by name, and a CPU's measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.run import peak
from fedsim.run.peak import Peak, device_peak, published, run_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bfloat16", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 2.039),
        ("NVIDIA A100-SXM4-40GB", 312.0, 1.555),
        ("NVIDIA A100-PCIE-40GB", 312.0, 1.555),
        ("NVIDIA A100 80GB PCIe", 312.0, 1.935),
        ("NVIDIA H100 80GB HBM3", 989.5, 3.35),
        ("NVIDIA H100 PCIe", 756.5, 2.0),
        ("NVIDIA H100 NVL", 835.5, 3.9),
        ("NVIDIA H200", 989.5, 4.8),
        ("NVIDIA H200 NVL", 835.5, 4.8),
        ("NVIDIA L40S", 362.05, 0.864),
    ],
)
def test_data_sheets_are_found_by_name(name: str, bfloat16: float, memory: float) -> None:
    found = published(name)
    assert found is not None and (found.bfloat16, found.memory) == (bfloat16, memory)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA A10", "NVIDIA GH200 480GB", "NVIDIA H20",
     "NVIDIA L40S-24Q", "NVIDIA L40S-48C", "GRID A100D-80C", "NVIDIA A100-40C", "NVIDIA L40"],
)  # fmt: skip
def test_other_devices_are_measured(name: str) -> None:
    assert published(name) is None


def test_a_cpu_is_measured_once_and_said_so() -> None:
    found = device_peak(CPU, torch.float32, 1)
    assert found.source == "CPU float32 on 1 thread, measured"
    assert 1e8 < found.flops < 1e14 and 1e8 < found.bytes_per_s < 1e13
    assert 0 <= found.spread < 1
    assert device_peak(CPU, torch.float32, 1) is found


def test_a_measurement_is_the_better_of_two_and_says_how_far_they_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 10 and 8 ms, then passes of 0.1 and 0.05 s."""
    seconds = iter([0.010, 0.1, 0.008, 0.05])
    monkeypatch.setattr(peak, "_best", lambda *_: next(seconds))
    found = peak._measured(CPU, torch.float32, 8, "made up")
    assert (found.flops, found.bytes_per_s) == pytest.approx((2 * 8**3 / 0.008, 2 * 2**26 / 0.05))
    assert found.spread == pytest.approx(0.5)


class Several(OneRank):
    """Ranks that all say what ``others`` says, beside this one."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value] if value is None else [value, *self.others]


def test_every_device_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "device_peak", lambda *_: Peak(5.0, 7.0, "made up"))
    assert run_peak(OneRank(), CPU, torch.float32) == Peak(5.0, 7.0, "1 x made up")
    others = [(1, Peak(3.0, 2.0, "made up", 0.25)), (2, Peak(1.0, 1.0, "made up")), (2, Peak(1.0, 1.0, "made up"))]
    assert run_peak(Several(others), CPU, torch.float32) == Peak(9.0, 10.0, "3 x made up", 0.25)


def test_a_gpu_of_the_data_sheets_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert device_peak(gpu, torch.bfloat16, 1) == Peak(989.5e12, 3.35e12, "NVIDIA H100 80GB HBM3 bfloat16, data sheet")
    assert device_peak(gpu, torch.float32, 1).flops == 67e12
