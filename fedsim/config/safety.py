"""Configuration of the guard and of constitutional AI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.base.errors import ConfigError
from fedsim.base.rounds import round_number
from fedsim.config.field import key
from fedsim.config.lora import LoraSettings


@dataclass(frozen=True)
class GuardConfig:
    """The safety filter that each client runs on its own rows (paper §4.1)."""

    # The guard and its prompt.
    kind: str = key(
        "none",
        "none = no filter; llama_guard = a guard model; oracle = the labels; noisy_oracle = the "
        "labels with errors (guard.tpr, guard.fpr)",
    )
    options: dict[str, Any] = key({}, "keyword arguments of a guard's own file")
    path: str = key(
        "embedded",
        "guard model directory, or 'embedded' for the tiny model",
        model="guard",
    )
    policy: str = key(
        "llama_guard_3",
        "hazard categories of the prompt",
        choices=("llama_guard_3", "square"),
    )

    # Action on unsafe rows.
    action: str = key(
        "drop",
        "action on a row that is called unsafe: drop = it is left out (paper), refuse = "
        "guard.refusal replaces its response, downweight = it counts guard.red_weight in the "
        "loss and in the client's weight",
        choices=("drop", "refuse", "downweight"),
    )
    refusal: str = key(
        "I'm sorry, but I can't help with that.",
        "refuse: the response that replaces the row's own",
        lines=True,
    )
    red_weight: float = key(
        0.1,
        "downweight: weight of a row that is called unsafe; 0 = as if dropped, 1 = as if safe",
        low=0,
        high=1,
    )

    # Classification.
    threshold: float = key(
        0.5,
        "a row is unsafe from this probability on; 0.5 = greedy decoding",
        above=0,
        below=1,
    )
    max_length: int = key(
        1024,
        "longest guard prompt; longer conversations are cut and counted",
        unit="tokens",
        low=400,
    )
    batch_tokens: int = key(
        2048,
        "tokens of a scored batch, without the prompts' common prefix; a longer row is one batch",
        unit="tokens",
        low=1,
    )

    # Fine-tuning of the guard model on its own rows.
    tune_epochs: float = key(
        5.0,
        "fine-tuning passes over the guard set; 0 = no fine-tuning",
        unit="epochs",
        low=0,
        high=10_000,
    )
    tune_lr: float = key(1e-4, "fine-tuning learning rate (AdamW, linear decay to 0)", above=0)
    tune_batch_size: int = key(16, "rows of one fine-tuning step", unit="rows", low=1)
    deepspeed: str = key(
        "",
        "fine-tune under DeepSpeed ZeRO-2 with this JSON file, or the name of one in "
        "configs/deepspeed (zero2); needs parallel.exact=false; '' = fedsim's own loop",
        file="deepspeed",
    )

    # Further measurements, for comparison.
    measure_untuned: bool = key(
        False,
        "where a guard model is fine-tuned, also classify the rows without that, to compare",
    )
    measure_policies: bool = key(
        False,
        "also classify the rows by the guard model that is not fine-tuned, under the policy that "
        "guard.policy is not, to compare",
    )

    # The guard's adapter.
    lora_r: int = key(16, "LoRA rank of the guard", low=1, high=65_536)
    lora_alpha: float = key(32.0, "LoRA alpha of the guard", above=0)
    lora_dropout: float = key(0.05, "LoRA dropout of the guard", low=0, below=1)
    lora_targets: list[str] = key(["q_proj", "v_proj"], "linear layers of the guard that get LoRA")

    # Errors of the noisy oracle.
    tpr: float = key(0.737, "noisy_oracle: chance that a red row is called unsafe", low=0, high=1)
    fpr: float = key(
        0.241,
        "noisy_oracle: chance that an acceptable row is called unsafe",
        low=0,
        high=1,
    )

    @property
    def lora(self) -> LoraSettings:
        """Settings of the guard's adapter."""
        return LoraSettings(
            self.lora_r,
            self.lora_alpha,
            self.lora_dropout,
            tuple(self.lora_targets),
        )

    @property
    def is_model(self) -> bool:
        """Return whether the filter is a guard model."""
        return self.kind == "llama_guard"

    def __post_init__(self) -> None:
        if self.action == "refuse" and not self.refusal.strip():
            raise ConfigError(
                "guard.action=refuse needs a text to train on instead: set guard.refusal",
            )
        if 0 < self.red_weight < 1e-6:
            rule = "so small a weight vanishes in fp32; set 0 or at least 1e-6"
            raise ConfigError(f"guard.red_weight={self.red_weight!r}: {rule}")


@dataclass(frozen=True)
class CaiConfig:
    """Constitutional AI on the global adapter after each round (paper §4.2)."""

    # Number and place of the iterations.
    iterations: int = key(
        0,
        "CAI iterations of a round that has CAI; one = an SFT and a DPO step on the same rows; 0 "
        "= no CAI; -1 = an epoch over the usable rows (see cai.max_new_tokens)",
        unit="iterations",
        low=-1,
        high=1_000_000,
    )
    every: int = key(
        1,
        "CAI after every this many rounds and after the last; 0 = only after the last (post hoc)",
        unit="rounds",
        low=0,
    )
    batch_size: int = key(16, "rows of one SFT or DPO step", unit="rows", low=1)

    # The conversations: response, criticism, revision.
    constitution: str = key(
        "responsible",
        "constitution JSON file, or the name of one in configs/constitution",
        file="constitution",
    )
    first_turn: str = key(
        "model",
        "author of the response that is criticised",
        choices=("model", "dataset"),
    )
    temperature: float = key(1.0, "sampling temperature of the three turns; 0 = greedy", low=0)
    max_new_tokens: int = key(
        512,
        "longest turn; a conversation whose response or revision is cut here is dropped and "
        "counted, and an epoch is that much shorter",
        unit="tokens",
        low=1,
    )

    # Training on them.
    sft_lr: float = key(5e-5, "learning rate of the SFT steps", above=0)
    dpo_lr: float = key(5e-5, "learning rate of the DPO steps", above=0)
    beta: float = key(0.1, "DPO beta", above=0)
    max_length: int = key(
        1024,
        "longer rows are cut at their end and counted",
        unit="tokens",
        low=16,
    )

    @property
    def is_on(self) -> bool:
        """Return whether the run has CAI."""
        return self.iterations != 0

    def is_due(self, round_idx: int, num_rounds: int) -> bool:
        """Return whether a round of ``num_rounds`` (counted from 0) ends with CAI."""
        if not self.is_on:
            return False
        # Rounds are counted from 0 here, and from 1 in the key.
        is_last = round_idx == num_rounds - 1
        return is_last or (self.every > 0 and round_number(round_idx) % self.every == 0)

    def num_stages(self, num_rounds: int) -> int:
        """Count the CAI stages of the first ``num_rounds`` rounds, without the run's last round."""
        if not self.is_on or self.every == 0:
            return 0
        return num_rounds // self.every
