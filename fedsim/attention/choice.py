"""Which attention backend a model gets: what model.attention asks for, or under ``auto`` the best that is proved."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PretrainedConfig

from fedsim.attention.backends import varlen_keywords
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.errors import ModelError
from fedsim.proved import is_proved

ORDER: Final = ("varlen", "flash_attention_2", "sdpa", "eager")
"""What ``auto`` tries, best first."""

CUDA_ONLY: Final = ("varlen", "flash_attention_2")
"""Backends that ``auto`` takes only where a committed GPU row has shown them right."""


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken.

    Attributes:
        name: of :data:`fedsim.attention.backends.BACKENDS`.
        why: in words, such as "asked for".
    """

    name: str
    why: str

    @property
    def implementation(self) -> str:
        """Its name among transformers' attention implementations."""
        return IMPLEMENTATIONS[self.name]


def choose(wanted: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    """The backend for a model.

    Args:
        wanted: model.attention: ``auto`` or a backend's name.
        config: the model's.
        dtype: of its weights.

    Raises:
        ModelError: the backend that is asked for cannot be had here, with the reason and what to do.
    """
    if wanted != "auto":
        if found := problem(wanted, config, dtype, device):
            raise ModelError(f"model.attention={wanted!r}: {found}")
        return Choice(wanted, "asked for" + _remark(wanted))
    passed_over: list[tuple[str, str]] = []
    for name in ORDER:
        found = problem(name, config, dtype, device)
        if found is None and name in CUDA_ONLY and not is_proved(name):
            found = "no committed GPU run has shown it right yet; ask for it by name"
        if found is None:
            why_not = "".join(f"; not {other}: {why}" for other, why in passed_over)
            return Choice(name, "auto" + why_not + _remark(name))
        if device.type == "cuda" or name not in CUDA_ONLY:  # nobody expects CUDA's kernels on a CPU
            passed_over.append((name, found))
    raise AssertionError("eager attention is always there")


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


def head_sizes(text: PretrainedConfig) -> tuple[int, int]:
    """Numbers of a key head and of a value head; latent attention (DeepSeek) makes them of different sizes."""
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    plain, rotated = (getattr(text, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    keys = plain + rotated if plain and rotated else getattr(text, "qk_head_dim", None)
    return int(keys or width), int(getattr(text, "v_head_dim", None) or width)


def num_key_heads(text: PretrainedConfig) -> int:
    """Key heads of a layer; latent attention (DeepSeek) unfolds one for each query head."""
    heads = int(text.num_attention_heads)
    if getattr(text, "kv_lora_rank", None):
        return heads
    return int(getattr(text, "num_key_value_heads", None) or heads)


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
