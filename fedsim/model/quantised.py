"""Check of quantised weights before a run: can they be loaded, and LoRA be trained on them."""

from __future__ import annotations

import copy
from typing import Any, Final

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer
from transformers.utils import logging as transformers_logging

from fedsim.base.errors import ModelError, reason

LINEAR: Final = ("bitsandbytes", "compressed-tensors", "fp8", "quanto", "torchao")
"""Methods whose layers are still ``torch.nn.Linear``, the ones to which fedsim adds LoRA."""

GIVE_PLAIN: Final = "give the model's directory without quantisation (bfloat16 or float32 weights)"


def quantisation(config: PretrainedConfig) -> dict[str, Any] | None:
    """Settings of the quantisation in a model's config.json; None if its weights are plain."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        return dict(found if isinstance(found, dict) else found.to_dict())
    return None


def check_quantised(config: PretrainedConfig, *, trains: bool) -> None:
    """Check quantised weights with transformers' quantiser, loading nothing; plain weights pass.

    Args:
        config: the model's; left as it is.
        trains: LoRA is to be attached.

    Raises:
        ModelError: an unknown method, a library or device that is not here, or layers that LoRA
            cannot be trained on.
    """
    settings = quantisation(config)
    if settings is None:
        return
    method = settings.get("quant_method", "unknown")
    method = str(getattr(method, "value", method))  # an enum in some versions
    where = f"its weights are quantised (quant_method={method!r} in config.json)"

    # Build the quantiser, which checks for libraries and devices.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are errors below
    try:
        if not AutoHfQuantizer.supports_quant_method(settings):
            raise ValueError("transformers does not know this method")
        quantiser, _, _ = get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
        is_trainable = bool(quantiser.is_trainable)
    except Exception as error:  # of any class: ImportError, RuntimeError, ValueError, …
        fix = f"install what is missing, or {GIVE_PLAIN}"
        raise ModelError(f"{where} and cannot be loaded here: {reason(error)}; {fix}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)

    if trains and not (is_trainable and method in LINEAR):
        fix = f"{GIVE_PLAIN}, or one of {', '.join(LINEAR)}"
        raise ModelError(f"{where} in a form that LoRA cannot be trained on here; {fix}")
