"""DeepSpeed settings of guard fine-tuning: the user's JSON file, completed from the configuration.

A key that fedsim decides may be left out, be "auto", or have the same value; anything else is an
error that names both. The user may set the keys of :data:`FREE`, which decide memory and speed; the
file may have no other key of DeepSpeed's: it could change results, write files, or print.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fedsim.base.errors import ConfigError
from fedsim.base.json_text import parse_json
from fedsim.base.paths import user_path
from fedsim.config import Config

SHIPPED: Final = Path(__file__).parents[1] / "configs" / "deepspeed"

FREE: Final = frozenset(
    {
        "zero_optimization.contiguous_gradients",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_scatter",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.allgather_partitions",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.use_multi_rank_bucket_allreduce",
    },
)
"""Keys that the file may set freely; DeepSpeed checks their values."""


def zero_settings(config: Config, num_ranks: int) -> dict[str, Any]:
    """Return DeepSpeed's settings, from the file that ``guard.deepspeed`` names.

    Args:
        config: the run's configuration.
        num_ranks: data-parallel ranks.

    Raises:
        ConfigError: the file cannot be used or contradicts the configuration, or DeepSpeed is not
            installed.
    """
    path = config.guard.deepspeed
    settings = _read(path)
    decided = _decided(config, num_ranks)
    _check_names(path, settings, decided)
    # Fill in what fedsim decides, and refuse other values in the file.
    for name, (wanted, source) in decided.items():
        *groups, leaf = name.split(".")
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
        given = place.get(leaf, wanted)
        if given not in (wanted, "auto"):
            raise ConfigError(
                f"guard.deepspeed={path!r}: {name}={given!r} contradicts {wanted!r}, which "
                f"follows from {source}; remove {name} from the file"
            )
        place[leaf] = wanted
    del settings["scheduler"]  # the training loop sets the learning rate
    # DeepSpeed computes it as passes × rows × ranks, which is more where these do not divide.
    del settings["train_batch_size"]
    _check_zero(path, settings["zero_optimization"])
    return settings


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for computing on ``device_type``, instead of hardware that it would detect.

    Raises:
        ConfigError: ``DS_ACCELERATOR`` names something else.
    """
    named = os.environ.setdefault("DS_ACCELERATOR", device_type)
    if named != device_type:
        fix = f"the run computes on {device_type}; unset this variable"
        raise ConfigError(f"DS_ACCELERATOR={named!r}: {fix}")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().device_name() == device_type
    return deepspeed


def _check_names(path: str, settings: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    """Check that every key of the file is a known one, and that groups are objects.

    Args:
        path: as ``guard.deepspeed`` names the file.
        settings: the file's content.
        decided: keys that fedsim decides, by full name such as "bf16.enabled".

    Raises:
        ConfigError: a key is unknown, or a group is no object.
    """
    known = [*decided, *sorted(FREE)]
    groups: set[str] = set()  # all prefixes of known names
    for name in known:
        *parents, _ = name.split(".")
        groups.update(".".join(parents[: i + 1]) for i in range(len(parents)))
    for name, value in _walk(settings, groups):
        if name in groups and not isinstance(value, dict):
            raise ConfigError(f"guard.deepspeed={path!r}: {name} must be an object, is {value!r}")
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "remove it from the file"
            raise ConfigError(
                f"guard.deepspeed={path!r}: {name} is not a key that the file may have; {hint} "
                f"(it may have {', '.join(known)})"
            )


def _walk(
    settings: Mapping[str, Any],
    groups: set[str],
    prefix: str = "",
) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, by full name; those within groups too."""
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if f"{prefix}{key}" in groups and isinstance(value, dict):
            yield from _walk(value, groups, f"{prefix}{key}.")


def _check_zero(path: str, values: Mapping[str, Any]) -> None:
    """Check the values of zero_optimization with DeepSpeed's own validation.

    Raises:
        ConfigError: DeepSpeed refuses one.
    """
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        setting = f"{name}={first['input']!r}"
        raise ConfigError(f"guard.deepspeed={path!r}: {setting}: {first['msg']}") from error


def _decided(config: Config, num_ranks: int) -> dict[str, tuple[Any, str]]:
    """Return DeepSpeed's keys that fedsim sets: value, and the setting that decides it."""
    rows, micro = config.guard.tune_batch_size, config.local.micro_batch_size
    num_passes = math.ceil(math.ceil(rows / micro) / num_ranks)  # of the busiest rank
    # The sources, as messages name them.
    plain = "guard fine-tuning without DeepSpeed, which this must equal"
    fp32 = "the adapter, all that ZeRO holds, which is fp32 on a base of any model.dtype"
    sizes = f"guard.tune_batch_size={rows}, local.micro_batch_size={micro}"
    return {
        "train_batch_size": (rows, "guard.tune_batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "local.micro_batch_size"),
        "gradient_accumulation_steps": (
            num_passes,
            f"{sizes} and the number of processes ({num_ranks})",
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


def zero_file(name: str) -> Path:
    """Return the file that ``guard.deepspeed`` names: one that ships with fedsim, or a path."""
    shipped = SHIPPED / f"{name}.json"
    return shipped if shipped.is_file() else user_path(name)


def _read(path: str) -> dict[str, Any]:
    """Read the file that ``guard.deepspeed`` names.

    Raises:
        ConfigError: it cannot be read or is no JSON object, or DeepSpeed is not installed.
    """
    key = f"guard.deepspeed={path!r}"
    try:
        content = parse_json(zero_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"{key}: cannot be read ({error.strerror}); give a DeepSpeed JSON file, or the name of "
            f"one that ships with fedsim ({names})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{key}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: must be a JSON object, is a {type(content).__name__}")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{key}: DeepSpeed is not installed; pip install fedsim[deepspeed]")
    return content
