"""All configuration keys of a run, group by group, and the rules between groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.base.errors import ConfigError
from fedsim.base.paths import user_path
from fedsim.config.attacks import AttackConfig, check_attacks
from fedsim.config.failures import FailuresConfig
from fedsim.config.field import key
from fedsim.config.measuring import (
    EvalConfig,
    JudgeConfig,
    ParallelConfig,
    RecordConfig,
    WandbConfig,
)
from fedsim.config.safety import CaiConfig, GuardConfig
from fedsim.config.training import (
    DataConfig,
    FederationConfig,
    LocalConfig,
    ModelConfig,
    ServerOptimizerConfig,
)


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = key("demo", "name of the run; its directory is record.dir/name")
    seed: int = key(0, "seed of every draw", low=0)
    attacks: list[AttackConfig] = key(
        [],
        "attacks on the federation, such as [{kind: my.py:SignFlip, share: 0.2, "
        "from_round: 3, until_round: 9, options: {scale: 5}}]",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    cai: CaiConfig = field(default_factory=CaiConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"name={self.name!r}: must be the name of a directory, without '/'")

        # A run's directory is not the folder that runs share.
        if _real(os.path.join(self.record.dir, self.name)) == _real(self.record.artefacts):
            raise ConfigError(
                f"name={self.name!r}: the run's directory would be the one that runs share, "
                f"record.artefacts={self.record.artefacts!r}; give another name, or another "
                "record.artefacts",
            )

        # Guard: rows to tune on, and no DeepSpeed in exact mode.
        if self.guard.is_model and self.guard.tune_epochs > 0 and self.data.guard_rows == 0:
            fix = "set data.guard_rows, or guard.tune_epochs=0"
            raise ConfigError(f"guard.tune_epochs > 0 needs rows to tune on: {fix}")
        if self.guard.deepspeed and self.parallel.exact:
            raise ConfigError(
                f"guard.deepspeed={self.guard.deepspeed!r}: DeepSpeed's sums depend on the number "
                "of processes, which exact mode rules out; set parallel.exact=false, or "
                "guard.deepspeed='' for fedsim's own loop",
            )

        # Evaluation: a tuned guard only if one is tuned, and answers for the judge.
        is_tuned = self.guard.tune_epochs > 0 and self.data.guard_rows > 0
        if self.eval.guard_judge == "tuned" and not is_tuned:
            raise ConfigError(
                "eval.guard_judge=tuned needs a guard that is fine-tuned: set guard.tune_epochs "
                "and data.guard_rows, or eval.guard_judge=untuned",
            )
        if self.judge.is_on and not self.eval.mt_bench:
            raise ConfigError(
                f"judge.kind={self.judge.kind}: there is nothing to judge, as eval.mt_bench='' "
                "leaves MT-Bench out; set eval.mt_bench, or judge.kind=none",
            )

        # CAI: questions to start from.
        if self.cai.is_on and self.data.cai_rows == 0 and self.data.guard_rows == 0:
            raise ConfigError(
                "cai.iterations needs questions: set data.cai_rows or data.guard_rows",
            )

        # Failures and attacks need a cohort.
        self._check_failures()
        federation = self.federation
        baseline = ""
        if not federation.has_cohort:
            baseline = federation.algorithm
        check_attacks(self.attacks, federation.num_clients, federation.num_rounds, baseline)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return user_path(self.record.dir) / self.name

    def _check_failures(self) -> None:
        """Check failures, drop-outs and stragglers against the cohort and the number of steps."""
        failures, federation = self.failures, self.federation
        if failures.min_clients > federation.clients_per_round:
            raise ConfigError(
                f"failures.min_clients={failures.min_clients}: must be <= "
                f"federation.clients_per_round ({federation.clients_per_round}); lower it, or "
                "draw more clients",
            )
        if failures.straggler_rate > 0 and self.local.steps < 2:
            raise ConfigError(
                f"failures.straggler_rate={failures.straggler_rate!r}: a straggler takes fewer "
                f"steps than local.steps={self.local.steps}, and at least one; set local.steps to "
                "2 or more, or the rate to 0",
            )

        # One participant: all keys have their defaults, except the bound on the update's norm.
        if not federation.has_cohort:
            usual = FailuresConfig(max_update_norm=failures.max_update_norm)
            for name, wanted in vars(usual).items():
                if getattr(failures, name) != wanted:
                    raise ConfigError(
                        f"failures.{name}={getattr(failures, name)!r}: "
                        f"federation.algorithm={federation.algorithm} has one participant and no "
                        f"cohort that could go on without it; leave the key at {wanted!r}",
                    )


def _real(path: str) -> str:
    """Resolve ``~`` and links in a path."""
    return os.path.realpath(os.path.expanduser(path))
