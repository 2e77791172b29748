"""Typed configuration: dataclasses, YAML files and ``key=value`` overrides."""

from fedsim.config.attacks import AttackConfig
from fedsim.config.failures import FailuresConfig
from fedsim.config.loading import (
    LISTS,
    SHIPPED,
    code_key,
    code_names,
    code_role,
    config_file,
    describe,
    file_roles,
    flat_from_file,
    from_flat,
    load_config,
    model_roles,
    to_flat,
    to_nested,
    with_overrides,
)
from fedsim.config.measuring import (
    BenchmarkConfig,
    EvalConfig,
    JudgeConfig,
    ParallelConfig,
    RecordConfig,
    WandbConfig,
)
from fedsim.config.page import help_text
from fedsim.config.safety import CaiConfig, GuardConfig
from fedsim.config.schema import Config
from fedsim.config.training import (
    DataConfig,
    FederationConfig,
    LocalConfig,
    ModelConfig,
    ServerOptimizerConfig,
)

__all__ = [
    "LISTS",
    "SHIPPED",
    "AttackConfig",
    "BenchmarkConfig",
    "CaiConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FailuresConfig",
    "FederationConfig",
    "GuardConfig",
    "JudgeConfig",
    "LocalConfig",
    "ModelConfig",
    "ParallelConfig",
    "RecordConfig",
    "ServerOptimizerConfig",
    "WandbConfig",
    "code_key",
    "code_names",
    "code_role",
    "config_file",
    "describe",
    "file_roles",
    "flat_from_file",
    "from_flat",
    "help_text",
    "load_config",
    "model_roles",
    "to_flat",
    "to_nested",
    "with_overrides",
]
