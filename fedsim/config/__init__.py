"""Typed configuration: dataclasses, YAML files and ``key=value`` overrides."""

from fedsim.config.loading import describe, from_flat, help_text, load_config, to_flat, to_nested
from fedsim.config.schema import (
    CaiConfig,
    Config,
    DataConfig,
    EvalConfig,
    FederationConfig,
    GuardConfig,
    LocalConfig,
    ModelConfig,
    ParallelConfig,
    RecordConfig,
)

__all__ = [
    "CaiConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FederationConfig",
    "GuardConfig",
    "LocalConfig",
    "ModelConfig",
    "ParallelConfig",
    "RecordConfig",
    "describe",
    "from_flat",
    "help_text",
    "load_config",
    "to_flat",
    "to_nested",
]
