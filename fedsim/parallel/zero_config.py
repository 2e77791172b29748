"""DeepSpeed settings of guard fine-tuning: the user's JSON, in which fedsim fills in what its configuration decides.

A key that fedsim decides may be left out, be "auto", or say the same; anything else is an error that names both.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, Final

from fedsim.config import Config
from fedsim.errors import ConfigError

SHIPPED: Final = Path(__file__).parents[1] / "configs" / "deepspeed"


def zero_settings(config: Config, num_ranks: int) -> dict[str, Any]:
    """The whole of what DeepSpeed is given, from the file that ``guard.deepspeed`` names.

    Args:
        config: the run's configuration.
        num_ranks: data-parallel ranks.

    Raises:
        ConfigError: the file cannot be used or contradicts the configuration, or DeepSpeed is not installed.
    """
    path = config.guard.deepspeed
    settings = _read(path)
    for name, (wanted, source) in _decided(config, num_ranks).items():
        *groups, leaf = name.split(".")
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"guard.deepspeed={path!r}: {group} must be an object, is {place!r}")
        given = place.get(leaf, wanted)
        if given not in (wanted, "auto"):
            raise ConfigError(
                f"guard.deepspeed={path!r}: {name}={given!r} contradicts {wanted!r}, which follows from {source}; "
                f"remove {name} from the file"
            )
        place[leaf] = wanted
    del settings["scheduler"]
    del settings["train_batch_size"]  # DeepSpeed's own is passes × rows × ranks, more where they do not divide
    return settings


def _decided(config: Config, num_ranks: int) -> dict[str, tuple[Any, str]]:
    """Keys of DeepSpeed's that are fedsim's to set: value, and what it follows from."""
    rows, micro = config.guard.tune_batch_size, config.local.micro_batch_size
    num_passes = math.ceil(math.ceil(rows / micro) / num_ranks)
    plain = "guard fine-tuning without DeepSpeed, which this must equal"
    fp32 = "the adapter, all that ZeRO holds, which is fp32 on a base of any model.dtype"
    return {
        "train_batch_size": (rows, "guard.tune_batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "local.micro_batch_size"),
        "gradient_accumulation_steps": (
            num_passes,
            f"guard.tune_batch_size={rows}, local.micro_batch_size={micro} and the number of processes ({num_ranks})",
        ),
        "gradient_clipping": (1.0, plain),
        "optimizer.type": ("AdamW", plain),
        "optimizer.params.torch_adam": (True, "fedsim, which compiles no operator at run time"),
        "optimizer.params.lr": (config.guard.tune_lr, "guard.tune_lr"),
        "optimizer.params.betas": ([0.9, 0.999], plain),
        "optimizer.params.eps": (1e-8, plain),
        "optimizer.params.weight_decay": (0.0, plain),
        "scheduler": (None, "guard.tune_lr, which decays to 0 over the steps"),
        "zero_optimization.stage": (2, "fedsim, which fine-tunes under ZeRO-2"),
        "bf16.enabled": (False, fp32),
        "fp16.enabled": (False, fp32),
    }


def _read(path: str) -> dict[str, Any]:
    shipped = SHIPPED / f"{path}.json"
    file = shipped if shipped.is_file() else Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"guard.deepspeed={path!r}: cannot be read ({error.strerror}); give a DeepSpeed JSON file, or the name of "
            f"one that ships with fedsim ({names})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"guard.deepspeed={path!r}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"guard.deepspeed={path!r}: must be a JSON object, is a {type(content).__name__}")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"guard.deepspeed={path!r}: DeepSpeed is not installed; pip install fedsim[deepspeed]")
    return content
