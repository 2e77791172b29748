"""Configuration of data, model, clients and the federated algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.base.errors import ConfigError
from fedsim.config.field import key
from fedsim.config.lora import LoraSettings
from fedsim.extend import KINDS


@dataclass(frozen=True)
class DataConfig:
    """Source of the rows and their splits."""

    # The file.
    square: str = key(
        "embedded",
        "SQuARe-format JSON file of responses, or 'embedded' for the fictional corpus, which "
        "has as many rows as the splits need, up to 6,400",
        file="square",
    )
    language: str = key(
        "en",
        "text fields to read: en = question_en / response_en, ko = question / response",
        choices=("en", "ko"),
    )

    # Three splits with their shares of red rows.
    federated_rows: int = key(2000, "rows distributed over the clients", unit="rows", low=1)
    federated_red_share: float = key(0.3, "share of red rows in the federated set", low=0, high=1)
    guard_rows: int = key(2000, "rows for guard fine-tuning; 0 = none", unit="rows", low=0)
    guard_red_share: float = key(0.5, "share of red rows in the guard set", low=0, high=1)
    cai_rows: int = key(
        400,
        "rows whose questions CAI uses; 0 = the guard set's questions, as in the paper",
        unit="rows",
        low=0,
    )
    cai_red_share: float = key(0.5, "share of red rows in the CAI set", low=0, high=1)

    # Rules of the split.
    fit: bool = key(
        False,
        "shrink all splits by one factor if the file is too small, instead of an error",
    )
    group_by_question: bool = key(
        False,
        "keep all responses to one question inside one split (paper: off)",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the adapter that is trained."""

    # The base model.
    path: str = key(
        "embedded",
        "Hugging Face model directory, or 'embedded' for the tiny model that ships with fedsim",
        model="model",
    )
    dtype: str = key(
        "auto",
        "base weights: auto = bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = key(
        "auto",
        "attention backend: varlen = torch's own variable-length kernel (bf16 or fp16 on CUDA); "
        "flash_attention_2 = the flash-attn package; sdpa; eager = the definition; auto = the "
        "first of these that is available and passes its self-test on this device",
        choices=("auto", "varlen", "flash_attention_2", "sdpa", "eager"),
    )
    max_context: int = key(4096, "longest prompt and reply together", unit="tokens", low=64)

    # The adapter.
    lora_r: int = key(32, "LoRA rank", low=1, high=65_536)
    lora_alpha: float = key(64.0, "LoRA alpha; the update is scaled by alpha / rank", above=0)
    lora_dropout: float = key(0.05, "dropout on the LoRA input during training", low=0, below=1)
    lora_targets: list[str] = key(["q_proj", "v_proj"], "names of the linear layers that get LoRA")

    @property
    def lora(self) -> LoraSettings:
        """Settings of the adapter."""
        return LoraSettings(
            self.lora_r,
            self.lora_alpha,
            self.lora_dropout,
            tuple(self.lora_targets),
        )


@dataclass(frozen=True)
class LocalConfig:
    """A client's local training in one round."""

    # Steps and rows.
    steps: int = key(
        25,
        "optimizer steps of a client in a round",
        unit="steps",
        low=1,
        high=1_000_000,
    )
    batch_size: int = key(16, "rows of one optimizer step", unit="rows", low=1)
    micro_batch_size: int = key(
        4,
        "rows of one forward and backward pass, of clients, guard tuning and CAI",
        unit="rows",
        low=1,
    )

    # AdamW; the learning rate falls from round to round.
    lr: float = key(5e-5, "AdamW learning rate in the first round", above=0)
    lr_min: float = key(
        1e-6,
        "end of the cosine over rounds, which would be reached one round after the last",
        low=0,
    )
    weight_decay: float = key(0.0, "AdamW weight decay, of clients and CAI", low=0)
    max_grad_norm: float = key(
        1.0,
        "gradient norm is clipped to this, of clients and CAI; 0 = no clipping",
        low=0,
    )
    max_length: int = key(
        512,
        "longer training rows are cut at their end and counted",
        unit="tokens",
        low=16,
    )

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of an optimizer step of a client."""
        return self.micro_batches(self.batch_size)

    def micro_batches(self, num_rows: int) -> int:
        """Return the number of micro-batches of ``num_rows``; the last one may be smaller."""
        return -(-num_rows // self.micro_batch_size)  # rounded up

    def __post_init__(self) -> None:
        if self.lr_min > self.lr:
            raise ConfigError(
                f"local.lr_min={self.lr_min!r}: must be <= local.lr ({self.lr!r}), which the "
                "cosine falls from; lower it, or raise local.lr",
            )


@dataclass(frozen=True)
class FederationConfig:
    """Clients, rounds and the aggregation algorithm."""

    # The algorithm and its scale.
    algorithm: str = key(
        "fedavg",
        "server and client rule; the baselines: local = only one client (local_client), "
        "centralised = all clients' rows together, with as many steps a round as a cohort takes",
    )
    options: dict[str, Any] = key(
        {},
        "keyword arguments of an algorithm's own file, such as {num_byzantine: 1}",
    )
    num_clients: int = key(20, "simulated clients", low=1, high=1_000_000)
    clients_per_round: int = key(5, "clients of a round's cohort", low=1)
    num_rounds: int = key(50, "rounds", low=1, high=1_000_000)

    # Distribution of rows over clients.
    partition: str = key(
        "fixed_red_share",
        "distribution of rows over clients: fixed_red_share = each client has the same share of "
        "red rows; iid = at random; beta_red_share = each client's red share is drawn "
        "(beta_concentration); dirichlet = each category is distributed unequally, quantity_skew "
        "= clients have unequal numbers of rows (dirichlet_alpha)",
    )
    partition_options: dict[str, Any] = key({}, "keyword arguments of a partition's own file")
    beta_concentration: float = key(
        10.0,
        "beta_red_share: a + b of the Beta distribution around the whole set's red share; small "
        "= shares near 0 or 1, large = equal shares",
        low=1e-9,
        high=1e9,
    )
    dirichlet_alpha: float = key(
        1.0,
        "dirichlet, quantity_skew: small = skewed, large = equal",
        low=1e-9,
        high=1e9,
    )

    # Parameters of single algorithms.
    scaffold_correction: str = key(
        "openfedllm",
        "openfedllm: y -= lr * (c - c_i) after the AdamW step; gradient: c - c_i is added to the "
        "gradient, c_i is the client's mean gradient",
        choices=("openfedllm", "gradient"),
    )
    prox_mu: float = key(0.01, "fedprox: strength of the pull towards the global adapter", low=0)
    local_client: int = key(0, "local: the only client that trains, counted from 0", low=0)

    @property
    def has_cohort(self) -> bool:
        """Return whether several clients train in a round; a baseline has one participant."""
        # A user's algorithm always has a cohort.
        own = KINDS["federation.algorithm"].own.get(self.algorithm)
        return own is None or own.has_cohort

    def __post_init__(self) -> None:
        if self.clients_per_round > self.num_clients:
            raise ConfigError(
                f"federation.clients_per_round={self.clients_per_round}: must be <= "
                f"federation.num_clients ({self.num_clients}); lower it or add clients",
            )
        if self.algorithm == "local" and self.local_client >= self.num_clients:
            raise ConfigError(
                f"federation.local_client={self.local_client}: must be < federation.num_clients "
                f"({self.num_clients}); clients are counted from 0",
            )


@dataclass(frozen=True)
class ServerOptimizerConfig:
    """The server's optimizer under fedavgm, fedadagrad, fedyogi and fedadam.

    See Reddi et al. 2021, arXiv 2003.00295.
    """

    # The variant decides which of the other keys are used.
    variant: str = key(
        "openfedllm",
        "openfedllm: as in that code base; reddi: as published",
        choices=("openfedllm", "reddi"),
    )
    lr: float = key(
        1e-3,
        "server learning rate; fedavgm: none in the openfedllm variant, about 1 in reddi",
        above=0,
    )
    beta1: float = key(
        0.9,
        "decay of the first moment; fedadagrad has none in the openfedllm variant",
        low=0,
        below=1,
    )
    beta2: float = key(0.99, "decay of the second moment: fedyogi, fedadam", low=0, below=1)
    tau: float = key(
        1e-3,
        "adaptivity, added to the root of the second moment, which starts at tau squared",
        above=0,
    )
