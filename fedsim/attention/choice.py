"""Choice of an attention backend: the one that ``model.attention`` names, or under ``auto`` the best that works here.

On CUDA every backend but the definition is tried on the device itself (:mod:`fedsim.attention.self_test`), and all
processes of a run take the best one that works on each of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from transformers import PretrainedConfig

from fedsim.attention.backends import varlen_keywords
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.attention.self_test import fault, head_sizes, heads_of
from fedsim.base.errors import ModelError
from fedsim.base.ranks import OneRank, Ranks

ORDER: Final = ("varlen", "flash_attention_2", "sdpa", "eager")
"""What ``auto`` tries, best first."""

CUDA_ONLY: Final = ("varlen", "flash_attention_2")
"""Backends that need a GPU."""


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken.

    Attributes:
        name: of :data:`fedsim.attention.backends.BACKENDS`.
        why: in words, such as "asked for".
        tried: under ``auto``, what keeps each backend from being taken, best backend first; "" where nothing does.
    """

    name: str
    why: str
    tried: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def words(self) -> str:
        """The backend and the reason, as the log and the manifest have them."""
        return f"{self.name} ({self.why})"

    @property
    def implementation(self) -> str:
        """Its name among transformers' attention implementations."""
        return IMPLEMENTATIONS[self.name]


def choose(
    wanted: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks | None = None
) -> Choice:
    """The backend for a model, the same on all ranks.

    Args:
        wanted: model.attention: ``auto`` or a backend's name.
        config: the model's.
        dtype: of its weights.
        ranks: all of which call this; None: this process decides alone.

    Raises:
        ModelError: the backend that is asked for cannot be had, or computes something else here, on some rank; with the
            reason and what to do.
    """
    return agreed((ranks or OneRank()).each(lambda: _choose_here(wanted, config, dtype, device)))


def agreed(choices: Sequence[Choice]) -> Choice:
    """The best backend that all ranks can take.

    Args:
        choices: of the same model and setting, by rank.
    """
    tried: dict[str, str] = {}
    for name in choices[0].tried:
        reasons = [choice.tried[name] for choice in choices]
        failing = [rank for rank, reason in enumerate(reasons) if reason]
        tried[name] = reasons[failing[0]] if failing else ""
        if failing and len(failing) < len(choices):
            tried[name] = f"on rank {failing[0]}, {tried[name]}"
    return _best(tried) if tried else choices[0]


def _choose_here(wanted: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    """What this process would take by itself."""
    if wanted != "auto":
        if found := problem(wanted, config, dtype, device):
            raise ModelError(f"model.attention={wanted!r}: {found}")
        if found := _self_test(wanted, config, dtype, device):
            raise ModelError(f"model.attention={wanted!r}: {found}; set model.attention=auto")
        return Choice(wanted, "asked for" + _remark(wanted))
    tried: dict[str, str] = {}
    for name in ORDER:
        if name in CUDA_ONLY and device.type != "cuda":  # nobody expects CUDA's kernels on a CPU
            continue
        tried[name] = problem(name, config, dtype, device) or _self_test(name, config, dtype, device) or ""
    return _best(tried)


def _best(tried: Mapping[str, str]) -> Choice:
    """The first backend that nothing speaks against."""
    passed_over = ""
    for name, reason in tried.items():
        if not reason:
            return Choice(name, "auto" + passed_over + _remark(name), tried)
        passed_over += f"; not {name}: {reason}"
    raise AssertionError("eager attention is always there")


def _self_test(name: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend that can be had is not to be used; the definition, and torch on a CPU, are taken as they are."""
    if device.type == "cpu" or name == "eager":
        return None
    return next(filter(None, (fault(name, heads, dtype, device) for heads in heads_of(config))), None)


def _remark(name: str) -> str:
    """What a backend leaves to another one."""
    if name == "varlen" and "seqused_k" not in varlen_keywords():
        return f"; steps of decoding by sdpa, as varlen_attn of torch {torch.__version__} knows no slots"
    return ""


def problem(name: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend cannot be had, with the way out; None if it can."""
    if name in CUDA_ONLY and device.type != "cuda":
        return f"is CUDA's alone, and this run is on {device.type}; set model.attention=auto"
    if name in CUDA_ONLY and dtype not in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        return (
            f"computes in bfloat16 and float16, the model is {kind}; set model.dtype=bfloat16, or model.attention=sdpa"
        )
    if name in CUDA_ONLY and (found := _kernel_problem(name, config, device)):
        return found
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and name in ("sdpa", "varlen"):
        return (
            f"cannot cap scores, as the model asks for (attn_logit_softcapping={softcap}); set model.attention=eager, "
            "or flash_attention_2 on CUDA"
        )
    return _PACKAGES[name]() if name in _PACKAGES else None


def _kernel_problem(name: str, config: PretrainedConfig, device: torch.device) -> str | None:
    """What FlashAttention-2 computes: heads of up to 256 numbers, values as wide as keys, on Ampere or newer.

    torch's kernel wants multiples of 8 too; the package pads.
    """
    text = config.get_text_config()
    keys, values = head_sizes(text)
    if keys != values:  # latent attention (DeepSeek)
        return f"needs values as wide as keys, the model's heads have {keys} and {values}; set model.attention=sdpa"
    widest = max(keys, int(getattr(text, "global_head_dim", None) or 0))
    if widest > 256 or (name == "varlen" and widest % 8):
        rule = "multiples of 8 up to 256" if name == "varlen" else "up to 256"
        return f"takes heads of {rule} numbers, the model's have {widest}; set model.attention=sdpa"
    major, minor = _capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}; set model.attention=sdpa"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _no_flash_attn() -> str | None:
    if importlib.util.find_spec("flash_attn") is not None:
        return None
    return (
        "the flash-attn package is not installed; pip install flash-attn --no-build-isolation (built from source, for "
        "the installed torch), or set model.attention=auto"
    )


def _no_varlen() -> str | None:
    if varlen_keywords() >= {"scale", "window_size"}:
        return None
    return (
        f"torch {torch.__version__} has no varlen_attn that takes scale and window_size; install torch 2.11 or newer, "
        "or set model.attention=sdpa"
    )


_PACKAGES: Final[dict[str, Callable[[], str | None]]] = {
    "flash_attention_2": _no_flash_attn,
    "varlen": _no_varlen,
}
