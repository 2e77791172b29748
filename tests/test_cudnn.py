"""SDPA never takes cuDNN's kernels where fedsim has chosen a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedsim.parallel import device


@pytest.fixture()
def _cudnn_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("_cudnn_as_it_was")
def test_choosing_a_gpu_turns_cudnn_attention_off(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(device, "_try", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert device.choose_device("auto") == torch.device("cuda", 2) == chosen[0]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
