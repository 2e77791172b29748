"""Every configuration key, with its meaning, unit, default and rule. ``launch/run.py --help`` prints this file."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsim.config.keys import key
from fedsim.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they are split."""

    square: str = key("embedded", "SQuARe-format JSON file of responses, or 'embedded' for the fictional corpus")
    language: str = key("en", "text fields to read: en = question_en / response_en, ko = question / response",
                        choices=("en", "ko"))  # fmt: skip
    federated_rows: int = key(2000, "rows shared out to the clients", unit="rows", low=1)
    federated_red_share: float = key(0.3, "share of red rows in the federated set", low=0, high=1)
    guard_rows: int = key(2000, "rows for guard fine-tuning; 0 = none", unit="rows", low=0)
    guard_red_share: float = key(0.5, "share of red rows in the guard set", low=0, high=1)
    cai_rows: int = key(400, "rows whose questions CAI starts from; 0 = the guard set's questions, as in the paper",
                        unit="rows", low=0)  # fmt: skip
    cai_red_share: float = key(0.5, "share of red rows in the CAI set", low=0, high=1)
    fit: bool = key(False, "shrink all splits by one factor when the file is too small, instead of stopping")
    group_by_question: bool = key(False, "keep all responses to one question inside one split (paper: off)")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the adapter that is trained."""

    path: str = key("embedded", "Hugging Face model directory, or 'embedded' for the tiny model that ships with fedsim")
    dtype: str = key("auto", "base weights: auto = bfloat16 on CUDA, float32 on CPU",
                     choices=("auto", "float32", "bfloat16"))  # fmt: skip
    attention: str = key(
        "sdpa", "attention implementation of the model", choices=("sdpa", "eager", "flash_attention_2")
    )
    max_context: int = key(4096, "longest prompt and reply together", unit="tokens", low=64)
    lora_r: int = key(32, "LoRA rank", low=1)
    lora_alpha: float = key(64.0, "LoRA alpha; the update is scaled by alpha / rank", above=0)
    lora_dropout: float = key(0.05, "dropout on the LoRA input during training", low=0, below=1)
    lora_targets: list[str] = key(["q_proj", "v_proj"], "names of the linear layers that get LoRA")


@dataclass(frozen=True)
class LocalConfig:
    """A client's local training in one round."""

    steps: int = key(25, "optimizer steps of a client in a round", unit="steps", low=1)
    batch_size: int = key(16, "rows of one optimizer step", unit="rows", low=1)
    micro_batch_size: int = key(
        4, "rows of one forward and backward pass, of clients, guard tuning and CAI", unit="rows", low=1
    )
    lr: float = key(5e-5, "AdamW learning rate in the first round", above=0)
    lr_min: float = key(
        1e-6, "learning rate that the cosine over rounds tends to: it would be reached one round after the last", low=0
    )
    weight_decay: float = key(0.0, "AdamW weight decay, of clients and CAI", low=0)
    max_grad_norm: float = key(1.0, "gradient norm is clipped to this, of clients and CAI; 0 = no clipping", low=0)
    max_length: int = key(512, "longer training rows are cut at their end, counted", unit="tokens", low=16)


@dataclass(frozen=True)
class FederationConfig:
    """Clients, rounds and the aggregation algorithm."""

    algorithm: str = key("fedavg", "server and client rule", choices=("fedavg", "scaffold"))
    num_clients: int = key(20, "simulated clients", low=1)
    clients_per_round: int = key(5, "clients of a round's cohort", low=1)
    num_rounds: int = key(50, "rounds", low=1)
    partition: str = key("fixed_red_share", "how rows reach clients: fixed_red_share = each client gets the same share "
                         "of red rows, iid = at random", choices=("iid", "fixed_red_share"))  # fmt: skip
    scaffold_correction: str = key("openfedllm", "openfedllm: y -= lr * (c - c_i) after the AdamW step; gradient: "
                                   "c - c_i joins the gradient", choices=("openfedllm", "gradient"))  # fmt: skip

    def __post_init__(self) -> None:
        if self.clients_per_round > self.num_clients:
            raise ConfigError(
                f"federation.clients_per_round={self.clients_per_round}: must be <= federation.num_clients "
                f"({self.num_clients}); lower it or add clients"
            )


@dataclass(frozen=True)
class GuardConfig:
    """The safety filter that each client runs on its own rows (paper §4.1)."""

    kind: str = key("none", "none = no filter; llama_guard = a guard model; oracle = the labels; noisy_oracle = the "
                    "labels with errors", choices=("none", "llama_guard", "oracle", "noisy_oracle"))  # fmt: skip
    path: str = key("embedded", "guard model directory, or 'embedded' for the tiny model")
    policy: str = key("llama_guard_3", "hazard categories of the prompt", choices=("llama_guard_3", "square"))
    threshold: float = key(0.5, "a row is unsafe from this probability on; 0.5 = greedy decoding", above=0, below=1)
    max_length: int = key(1024, "longest guard prompt; longer conversations are cut, counted", unit="tokens", low=400)
    batch_size: int = key(64, "rows scored at once", unit="rows", low=1)
    tune_epochs: float = key(5.0, "fine-tuning passes over the guard set; 0 = use the guard as it is", unit="epochs",
                             low=0)  # fmt: skip
    tune_lr: float = key(1e-4, "fine-tuning learning rate (AdamW, linear decay to 0)", above=0)
    tune_batch_size: int = key(16, "rows of one fine-tuning step", unit="rows", low=1)
    measure_untuned: bool = key(
        False, "where a guard model is fine-tuned, also judge the rows without that, to compare"
    )
    lora_r: int = key(16, "LoRA rank of the guard", low=1)
    lora_alpha: float = key(32.0, "LoRA alpha of the guard", above=0)
    lora_dropout: float = key(0.05, "LoRA dropout of the guard", low=0, below=1)
    lora_targets: list[str] = key(["q_proj", "v_proj"], "linear layers of the guard that get LoRA")
    tpr: float = key(0.737, "noisy_oracle: chance that a red row is called unsafe", low=0, high=1)
    fpr: float = key(0.241, "noisy_oracle: chance that an acceptable row is called unsafe", low=0, high=1)

    @property
    def is_compared(self) -> bool:
        """Whether there is a fine-tuned guard to compare with the untuned one, and that was asked for."""
        return self.measure_untuned and self.kind == "llama_guard" and self.tune_epochs > 0


@dataclass(frozen=True)
class CaiConfig:
    """Constitutional AI on the global adapter after each round (paper §4.2)."""

    iterations: int = key(0, "CAI iterations a round; one = an SFT and a DPO step on the same rows; 0 = no CAI",
                          unit="iterations", low=0)  # fmt: skip
    batch_size: int = key(16, "rows of one SFT or DPO step", unit="rows", low=1)
    constitution: str = key("responsible", "constitution JSON file, or the name of one in configs/constitution")
    first_turn: str = key("model", "who wrote the response that is criticised", choices=("model", "dataset"))
    temperature: float = key(1.0, "sampling temperature of the three turns; 0 = greedy", low=0)
    max_new_tokens: int = key(512, "longest turn", unit="tokens", low=1)
    sft_lr: float = key(5e-5, "learning rate of the SFT steps", above=0)
    dpo_lr: float = key(5e-5, "learning rate of the DPO steps", above=0)
    beta: float = key(0.1, "DPO beta", above=0)
    max_length: int = key(1024, "longer rows are cut at their end, counted", unit="tokens", low=16)


@dataclass(frozen=True)
class EvalConfig:
    """Benchmarks, run on the pretrained model and on the global adapter before and after CAI."""

    every: int = key(0, "evaluate every so many rounds; 0 = after the last round only", unit="rounds", low=0)
    advbench: str = key("embedded", "AdvBench CSV file (goal,target), 'embedded', or '' to leave it out")
    advbench_phrases: str = key(
        "openfedllm",
        "rule of the headline figure; all are recorded; strict_world belongs to the embedded world",
        choices=("openfedllm", "openfedllm-fixed", "gcg", "strict", "strict_world"),
    )
    hhh: str = key("embedded", "HHH JSONL file, 'embedded', or '' to leave it out")
    hhh_scorer: str = key("letter", "scorer of the headline figure; all three are recorded",
                          choices=("letter", "generate", "likelihood"))  # fmt: skip
    mt_bench: str = key("embedded", "MT-Bench question.jsonl (answers are written, not judged), 'embedded' (scored by "
                        "its rubric), or '' to leave it out")  # fmt: skip
    temperature: float = key(0.7, "AdvBench sampling temperature; 0 = greedy", low=0)
    max_new_tokens: int = key(1024, "longest reply; longer ones are cut and counted", unit="tokens", low=1)
    batch_size: int = key(32, "rows generated or scored at once", unit="rows", low=1)
    limit: int = key(
        0, "use only a fixed random subset of so many items of each benchmark; 0 = all", unit="items", low=0
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over processes."""

    exact: bool = key(True, "bit-identical results for any number of processes; off: floating-point sums")
    threads: int = key(1, "CPU threads of each process; part of exact mode's contract", low=1)
    wide_lanes: bool = key(True, "let several ranks share one client where that ends the round sooner")
    timeout_s: float = key(1800.0, "a collective that waits longer than this ends the run", unit="s", above=0)


@dataclass(frozen=True)
class RecordConfig:
    """What is written, and where."""

    dir: str = key("runs", "run directories are made in here")
    artefacts: str = key("runs/artefacts", "guard, verdicts, CAI conversations and corpora shared between runs")
    resume: str = key("auto", "auto = go on from the run directory's last checkpoint if there is one; never = start "
                      "anew, which an existing run directory forbids", choices=("auto", "never"))  # fmt: skip
    keep_checkpoints: int = key(2, "checkpoints kept", low=1)
    texts: bool = key(False, "write the replies to AdvBench prompts into the run directory")


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = key("demo", "name of the run; its directory is record.dir/name")
    seed: int = key(0, "seed of every draw", low=0)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    cai: CaiConfig = field(default_factory=CaiConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"name={self.name!r}: must be the name of a directory, without '/'")
        if self.guard.kind == "llama_guard" and self.guard.tune_epochs > 0 and self.data.guard_rows == 0:
            raise ConfigError(
                "guard.tune_epochs > 0 needs rows to tune on: set data.guard_rows, or guard.tune_epochs=0"
            )
        if self.cai.iterations > 0 and self.data.cai_rows == 0 and self.data.guard_rows == 0:
            raise ConfigError("cai.iterations > 0 needs questions: set data.cai_rows or data.guard_rows")
