"""A fake ``cuda:0`` for a CPU build of torch: shapes, dtypes, devices and autograd are real, numbers are not.

:func:`load` must run before the process imports torch, which looks its CUDA hooks up once. Nothing here imports torch
at the top for that reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

SOURCE: Final = Path(__file__).with_name("guard.cpp")
CAPABILITY: Final = (8, 0)
"""Compute capability of the fake device: an A100's."""

CUDA_KERNELS: Final = ("silu_backward", "_fused_rms_norm")
"""Operators that have a kernel of their own on CUDA, and are composed of others where a device has none."""

_loaded: list[ctypes.CDLL] = []


def why_not() -> str | None:
    """Why the fake device cannot be had here, in words; None if it can."""
    if shutil.which("g++") is None:
        return "no g++ on the path, which builds the fake CUDA device"
    folder = _torch_folder()
    if folder is None:
        return "torch is not installed"
    if (build := _torch_version(folder)[1]) is not None:
        return f"torch is built for CUDA {build}, whose own hooks stand where the fake device's would; take a CPU build"
    return None


def load() -> None:
    """Build the stub with g++ (8 s, once per torch version) and load it.

    Raises:
        RuntimeError: torch is imported already, or g++ failed; its message is in the text.
    """
    if _loaded:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already and has looked up its CUDA hooks: load the fake device first")
    _loaded.append(ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL))


def stand_in() -> torch.device:
    """Put stand-ins in place of what torch's CPU build cannot do for CUDA; returns the fake device.

    Pinned memory is a copy that remembers it is pinned; generators are the CPU's; scaled_dot_product_attention becomes
    the operator that torch's CUDA build dispatches to on :data:`CAPABILITY`. They stay for the life of the process.
    """
    import torch
    from torch.nn import functional as F

    assert _loaded, "load() comes first"
    torch._C._set_only_lift_cpu_tensors(True)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a fake tensor runs no kernel")

    library = torch.library.Library("aten", "IMPL")
    for name in CUDA_KERNELS:
        library.impl(name, never, "CUDA")
    _kept_alive.append(library)

    real = torch.Generator

    class Generator:
        def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:  # type: ignore[misc]
            return real("cpu")

    torch.Tensor.pin_memory = _pinned  # type: ignore[method-assign, assignment]
    torch.Generator = Generator  # type: ignore[misc, assignment]
    torch.cuda.get_device_capability = lambda *_, **__: CAPABILITY
    F.scaled_dot_product_attention = _attention
    return torch.device("cuda", 0)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Return whether a CPU tensor came from :meth:`torch.Tensor.pin_memory` under the stand-ins."""
    return getattr(tensor, _PINNED, False)


_PINNED: Final = "_rehearsal_is_pinned"
_kept_alive: list[Any] = []


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = tensor.clone()
    setattr(copy, _PINNED, True)
    return copy


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The operator that torch's CUDA build takes (``sdp_utils.cpp``) for bf16 on an A100, cuDNN left out.

    Flash without a mask; memory-efficient with one; that one refuses grouped heads, which leaves the math kernel with
    all scores in fp32.
    """
    import torch

    assert dropout_p == 0.0
    aten = torch.ops.aten
    if attn_mask is None:
        out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    elif enable_gqa and query.shape[1] != key.shape[1]:
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True
        )
    else:
        mask = attn_mask
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
        mask = mask.expand(*query.shape[:3], key.shape[2])
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_grad, 0.0, is_causal, scale=scale
        )
    result: torch.Tensor = out[0]
    return result


def _built() -> Path:
    """The shared library for the installed torch, made if it is not there yet."""
    folder = _torch_folder()
    assert folder is not None
    key = hashlib.sha256(f"{folder} {_torch_version(folder)} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"fedsim-fakecuda-{os.getuid()}" / f"guard-{key}.so"
    if target.is_file() and target.stat().st_uid == os.getuid():
        return target
    target.parent.mkdir(mode=0o700, exist_ok=True)
    if target.parent.stat().st_uid != os.getuid():
        raise RuntimeError(f"{target.parent}: belongs to another user; remove it or set TMPDIR")
    half = target.with_suffix(f".{os.getpid()}.so")
    include, lib = folder / "include", folder / "lib"
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(half)]
    command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ cannot build {SOURCE.name} against torch in {folder}:\n{done.stderr[-2000:]}")
    half.replace(target)
    return target


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) if places else None


def _torch_version(folder: Path) -> tuple[str, str | None]:
    """The installed torch's version and the CUDA version that it is built for, from its file: nothing is imported."""
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '(.*)'", text, re.M)
    cuda = re.search(r"^cuda: Optional\[str\] = '(.*)'", text, re.M)
    return (version[1] if version else "", cuda[1] if cuda else None)
