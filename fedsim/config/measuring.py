"""Configuration of evaluation, judge, processes and records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import ConfigError
from fedsim.base.paths import user_path
from fedsim.config.field import key
from fedsim.extend import is_own, title

EMBEDDED, HELD_OUT = "embedded", "embedded-held-out"
"""Values of a file's key that select the embedded world's own items."""


def is_embedded(key_name: str, value: str) -> bool:
    """Return whether a file's key, such as ``eval.advbench``, selects the embedded world."""
    return value == EMBEDDED or (key_name == "eval.advbench" and value == HELD_OUT)


def is_unrated(mt_bench: str, *, judged: bool) -> bool:
    """Return whether MT-Bench answers get no score: only the embedded questions have a rubric.

    Args:
        mt_bench: ``eval.mt_bench``.
        judged: there is a judge.
    """
    return mt_bench not in ("", EMBEDDED) and not judged


@dataclass(frozen=True)
class BenchmarkConfig:
    """One benchmark from a user's file."""

    kind: str = key(
        "",
        "path/to/file.py:Name or module:Name of a class that derives from fedsim.Benchmark",
    )
    path: str = key("", "file that its load() reads")
    options: dict[str, Any] = key({}, "keyword arguments of the benchmark")


@dataclass(frozen=True)
class EvalConfig:
    """Benchmarks, run on the pretrained model and on the global adapter before and after CAI."""

    # Rounds that end with an evaluation.
    every: int = key(
        0,
        "evaluate after every this many rounds; 0 = only after the last round",
        unit="rounds",
        low=0,
    )

    # The benchmarks: files, scorers and rules.
    advbench: str = key(
        "embedded",
        "AdvBench CSV file (goal,target), 'embedded', 'embedded-held-out' (attack frames "
        "that nothing is trained or developed on, for a final report), or '' to leave it "
        "out",
        file="advbench",
    )
    advbench_phrases: str = key(
        "openfedllm",
        "rule of the headline figure; all are recorded; strict_world: only in the embedded world",
    )
    advbench_options: dict[str, Any] = key({}, "keyword arguments of a phrase rule's own file")
    hhh: str = key(
        "embedded",
        "HHH file (JSON lines or an array), 'embedded', or '' to leave it out",
        file="hhh",
    )
    hhh_scorer: str = key(
        "letter",
        "scorer of the headline figure; all three are recorded",
        choices=("letter", "generate", "likelihood"),
    )
    mt_bench: str = key(
        "embedded",
        "MT-Bench question.jsonl (scored by the judge), 'embedded' (scored by its rubric "
        "where there is no judge), or '' to leave it out",
        file="mt_bench",
    )
    mt_bench_references: str = key(
        "",
        "FastChat's reference_answer file, which a judge sees for math, reasoning and "
        "coding; '' = the questions' own references",
        file="mt_bench_references",
    )
    xstest: str = key(
        "embedded",
        "XSTest CSV file (prompts that only sound harmful, and harmful ones as a contrast), "
        "'embedded', or '' to leave it out",
        file="xstest",
    )
    helpful: str = key(
        "embedded",
        "held-out helpful conversations whose perplexity is measured: JSON lines or "
        "an array of messages, 'embedded', or '' to leave it out",
        file="helpful",
    )
    benchmarks: list[BenchmarkConfig] = key(
        [],
        "benchmarks of your own, such as [{kind: my.py:Name, path: my.csv, options: {n: 5}}]",
    )

    # The guard model on replies to attacks.
    guard_judge: str = key(
        "none",
        "also classify the replies to attacks by the guard model: untuned = without fine-tuning, "
        "tuned = fine-tuned like the filter",
        choices=("none", "untuned", "tuned"),
    )

    # Generation.
    temperature: float = key(0.7, "AdvBench sampling temperature; 0 = greedy", low=0)
    max_new_tokens: int = key(
        1024,
        "longest reply (of XSTest 256 at most); longer ones are cut and counted",
        unit="tokens",
        low=1,
    )
    batch_size: int = key(64, "rows generated or scored at once", unit="rows", low=1)
    limit: int = key(
        0,
        "use only a fixed random subset of this many items of each benchmark; 0 = all",
        unit="items",
        low=0,
    )

    @property
    def advbench_rule(self) -> str:
        """Name of the headline's rule in figures: a built-in rule's, or a user's function's."""
        return title("eval.advbench_phrases", self.advbench_phrases)


BUILT_IN_JUDGES: Final = ("model", "base_url", "path", "workers", "retries", "timeout_s")
"""Keys of :class:`JudgeConfig` that say how a built-in judge is asked."""


@dataclass(frozen=True)
class JudgeConfig:
    """The judge that rates MT-Bench answers from 1 to 10.

    The method is single-answer grading of arXiv 2306.05685.
    """

    kind: str = key(
        "none",
        "none = no judge; openai = any endpoint that speaks OpenAI's chat protocol, the key in "
        "OPENAI_API_KEY; local = a Hugging Face model",
    )
    options: dict[str, Any] = key({}, "keyword arguments of a judge's own file")

    # kind=openai: the endpoint; kind=local: the model.
    model: str = key("gpt-4", "openai: name of the model; it also names the judgment file")
    base_url: str = key(
        "",
        "openai: address of the endpoint, such as http://localhost:8000/v1; '' = OpenAI's own",
    )
    path: str = key("", "local: directory of the judge model, or 'embedded'", model="judge")

    # Prompts and judgments of either kind.
    prompts: str = key(
        "",
        "FastChat's judge_prompts.jsonl; '' = the one beside the question file or a folder above; "
        "none for a judge of your own",
        file="judge_prompts",
    )
    max_new_tokens: int = key(
        2048,
        "longest judgment, thoughts included; a longer one is cut off and unrated",
        unit="tokens",
        low=1,
    )

    # Requests to the endpoint.
    workers: int = key(4, "openai: concurrent requests", low=1)
    retries: int = key(
        5,
        "openai: further attempts after a failed request; pauses double from 0.5 s to 8 s, or are "
        "as long as the endpoint asks for, up to 2 minutes",
        low=0,
    )
    timeout_s: float = key(
        120.0,
        "openai: longest wait for a whole answer",
        unit="s",
        above=0,
        high=1e8,
    )

    @property
    def is_on(self) -> bool:
        """Return whether answers are judged."""
        return self.kind != "none"

    def __post_init__(self) -> None:
        if self.kind == "openai" and not self.model:
            fix = "set judge.model to a name that the endpoint knows"
            raise ConfigError(f"judge.kind=openai needs a model: {fix}")
        if self.kind == "local" and not self.path:
            raise ConfigError("judge.kind=local needs a model: set judge.path to its directory")

        # A judge of a user's own takes its arguments from judge.options.
        if not is_own("judge.kind", self.kind):
            for name in BUILT_IN_JUDGES:
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    raise ConfigError(
                        f"judge.{name}={value!r}: only built-in judges take this key; set "
                        "judge.options of your own one",
                    )

        # These errors do not quote the address: it may hold a password or a key.
        if "@" in self.base_url:
            raise ConfigError(
                "judge.base_url: must not hold '@', as a user's name and password would be "
                "written to config.yaml; take them out, and export OPENAI_API_KEY for an "
                "endpoint that wants a key",
            )
        if "?" in self.base_url or "#" in self.base_url:
            raise ConfigError(
                "judge.base_url: must end with its path, such as /v1: any text behind '?' or '#' "
                "would be written to config.yaml, and never reach the endpoint; export "
                "OPENAI_API_KEY for one that wants a key",
            )


@dataclass(frozen=True)
class ParallelConfig:
    """Distribution of the work over processes."""

    # Processes and their devices.
    device: str = key(
        "auto",
        "auto = a GPU; the CPU only where torch is built without CUDA and no NVIDIA driver is "
        "loaded; cuda = a GPU, or an error; cpu = the CPU",
        choices=("auto", "cuda", "cpu"),
    )
    exact: bool = key(
        True,
        "bit-identical results for any number of processes; off: floating-point sums",
    )
    threads: int = key(
        1,
        "CPU threads of each process; part of exact mode's contract",
        low=1,
        high=1024,
    )
    wide_lanes: bool = key(
        True,
        "let several ranks share one client where that ends the round sooner",
    )
    timeout_s: float = key(
        1800.0,
        "a collective that waits longer than this ends the run",
        unit="s",
        above=0,
        high=1e8,
    )


@dataclass(frozen=True)
class RecordConfig:
    """Files that a run writes, and their places."""

    # Folders.
    dir: str = key("runs", "folder of the run directories")
    artefacts: str = key(
        "runs/artefacts",
        "guard, verdicts, CAI conversations and corpora shared between runs",
    )

    # Checkpoints and texts.
    resume: str = key(
        "auto",
        "auto = resume from the run directory's last checkpoint if there is one; never = start "
        "from the beginning, an error if the run directory exists",
        choices=("auto", "never"),
    )
    keep_checkpoints: int = key(2, "checkpoints kept", low=1)
    texts: bool = key(
        False,
        "write the replies to attacks, and those of your own benchmarks, into the run directory",
    )

    @property
    def artefact_folder(self) -> Path:
        """Folder of the artefacts that runs share."""
        return user_path(self.artefacts)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: metrics of each round, streamed from rank 0.

    No text of a prompt or reply is sent. These keys take precedence over WANDB_MODE, WANDB_PROJECT
    and a sweep's agent in the environment; wandb itself reads the login and the server
    (WANDB_API_KEY, WANDB_BASE_URL).
    """

    mode: str = key(
        "offline",
        "offline = written to the run directory, for `wandb sync`; online = sent as it goes; off",
        choices=("off", "offline", "online"),
    )
    project: str = key("fedsim", "W&B project")
    entity: str = key("", "W&B user or team; '' = the account's default")
    group: str = key("", "W&B group, such as the arm of a table; '' = none")
    tags: list[str] = key([], "W&B tags, such as [seed-0]")
