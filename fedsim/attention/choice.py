"""Choice of an attention backend: that of ``model.attention``, or the best that works here.

On CUDA every backend but the definition is tried on the device itself
(:mod:`fedsim.attention.self_test`), and all processes of a run take the best one that works on each
of them.
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
"""Backends that ``auto`` tries, best first."""

CUDA_ONLY: Final = ("varlen", "flash_attention_2")
"""Backends that need a GPU."""


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for it.

    Attributes:
        name: of :data:`fedsim.attention.backends.BACKENDS`.
        why: in words, such as "asked for".
        tried: under ``auto``, backend → problem that rules it out, "" for none; best first.
    """

    name: str
    why: str
    tried: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def words(self) -> str:
        """The backend and the reason, in the words of the log and the manifest."""
        return f"{self.name} ({self.why})"

    @property
    def implementation(self) -> str:
        """Its name among transformers' attention implementations."""
        return IMPLEMENTATIONS[self.name]


def choose(
    wanted: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Choice:
    """Choose the backend for a model, the same on all ranks.

    Args:
        wanted: model.attention: ``auto`` or a backend's name.
        config: the model's.
        dtype: of its weights.
        device: on which it runs.
        ranks: all call this; None: only this process decides.

    Raises:
        ModelError: the backend that is asked for is not available on some rank, or computes
            something else there; with the reason and the fix.
    """
    if ranks is None:
        ranks = OneRank()
    return agreed(ranks.each(lambda: _choose_here(wanted, config, dtype, device)))


def agreed(choices: Sequence[Choice]) -> Choice:
    """Return the best backend that all ranks can take.

    Args:
        choices: of the same model and setting, by rank.
    """
    # Under `auto` each rank has tried the same backends; else there is nothing to choose.
    tried: dict[str, str] = {}
    for name in choices[0].tried:
        # The first failing rank's problem.
        problems = [choice.tried[name] for choice in choices]
        failing = [rank for rank, found in enumerate(problems) if found]
        tried[name] = problems[failing[0]] if failing else ""
        if failing and len(failing) < len(choices):
            tried[name] = f"on rank {failing[0]}, {tried[name]}"
    return _best(tried) if tried else choices[0]


def _choose_here(
    wanted: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """Choose a backend in this process, without the other ranks."""
    # The one that is asked for, or an error.
    if wanted != "auto":
        found = problem(wanted, config, dtype, device)
        if found is not None:
            raise ModelError(f"model.attention={wanted!r}: {found}")
        found = _self_test(wanted, config, dtype, device)
        if found is not None:
            raise ModelError(f"model.attention={wanted!r}: {found}; set model.attention=auto")
        return Choice(wanted, "asked for" + _remark(wanted))

    # All, each with its problem.
    tried: dict[str, str] = {}
    for name in ORDER:
        if name in CUDA_ONLY and device.type != "cuda":  # not worth a remark
            continue
        found = problem(name, config, dtype, device)
        if found is None:
            found = _self_test(name, config, dtype, device)
        tried[name] = found or ""
    return _best(tried)


def _best(tried: Mapping[str, str]) -> Choice:
    """Return the first backend without a problem; the reason lists those before it."""
    passed_over = ""  # the remarks on better ones
    for name, reason in tried.items():
        if not reason:
            return Choice(name, "auto" + passed_over + _remark(name), tried)
        passed_over += f"; not {name}: {reason}"
    raise AssertionError("eager attention is always there")


def _self_test(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Return a fault of an available backend's results; None if they are right.

    The definition, and torch on a CPU, are not tested.
    """
    if device.type == "cpu" or name == "eager":
        return None
    for heads in heads_of(config):
        found = fault(name, heads, dtype, device)
        if found is not None:
            return found
    return None


def _remark(name: str) -> str:
    """Return a remark on steps that a backend leaves to another one, or ""."""
    if name == "varlen" and "seqused_k" not in varlen_keywords():
        kernel = f"varlen_attn of torch {torch.__version__}"
        return f"; steps of decoding by sdpa, as {kernel} knows no slots"
    return ""


def problem(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Return the reason, and the fix, if a backend is not available; None if it is."""
    # CUDA's kernels: device, type, sizes of heads.
    if name in CUDA_ONLY:
        if device.type != "cuda":
            return f"runs only on CUDA, and this run is on {device.type}; set model.attention=auto"
        if dtype not in (torch.bfloat16, torch.float16):
            kind = str(dtype).removeprefix("torch.")
            fix = "set model.dtype=bfloat16, or model.attention=sdpa"
            return f"computes in bfloat16 and float16, the model is {kind}; {fix}"
        found = _kernel_problem(name, config, device)
        if found is not None:
            return found

    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and name in ("sdpa", "varlen"):
        fix = "set model.attention=eager, or flash_attention_2 on CUDA"
        wish = f"attn_logit_softcapping={softcap}"
        return f"cannot cap scores, as the model asks for ({wish}); {fix}"

    # The package, or the version of torch.
    if name in _PACKAGES:
        return _PACKAGES[name]()
    return None


def _kernel_problem(name: str, config: PretrainedConfig, device: torch.device) -> str | None:
    """Return the reason if FlashAttention-2 cannot compute a model's attention; None if it can.

    Its heads have up to 256 numbers, with values as wide as keys, and it runs on Ampere or newer.
    torch's kernel needs multiples of 8 too; the package pads.
    """
    fix = "set model.attention=sdpa"
    text = config.get_text_config()
    keys, values = head_sizes(text)  # numbers of a head
    if keys != values:  # latent attention (DeepSeek)
        return f"needs values as wide as keys, the model's heads have {keys} and {values}; {fix}"
    widest = max(keys, int(getattr(text, "global_head_dim", None) or 0))
    if widest > 256 or (name == "varlen" and widest % 8):
        rule = "multiples of 8 up to 256" if name == "varlen" else "up to 256"
        return f"takes heads of {rule} numbers, the model's have {widest}; {fix}"
    major, minor = _capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}; {fix}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _no_flash_attn() -> str | None:
    if importlib.util.find_spec("flash_attn") is not None:
        return None
    install = "pip install flash-attn --no-build-isolation"
    remark = "built from source, for the installed torch"
    problem = "the flash-attn package is not installed"
    return f"{problem}; {install} ({remark}), or set model.attention=auto"


def _no_varlen() -> str | None:
    if varlen_keywords() >= {"scale", "window_size"}:
        return None
    problem = f"torch {torch.__version__} has no varlen_attn that takes scale and window_size"
    return f"{problem}; install torch 2.11 or newer, or set model.attention=sdpa"


_PACKAGES: Final[dict[str, Callable[[], str | None]]] = {
    "flash_attention_2": _no_flash_attn,
    "varlen": _no_varlen,
}
