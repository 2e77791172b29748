"""Public data sets and models: their sources, and the files that the readers were tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedsim.record.tables import Table


@dataclass(frozen=True)
class Source:
    """One public file or model.

    Attributes:
        key: the configuration key that takes it.
        name: what it is called.
        place: where it is published; a repository and the path in it.
        licence: its licence.
        rows: what the tested file holds; empty where none was tested.
        file: its name.
        sha256: of the tested file; empty where none was tested.
    """

    key: str
    name: str
    place: str
    licence: str
    rows: str = ""
    file: str = ""
    sha256: str = ""


SOURCES = (
    Source(
        "data.square",
        "SQuARe, responses (arXiv 2305.17696)",
        "github.com/naver-ai/korean-safety-benchmarks: data/SQuARe/ (the train split for the paper's runs)",
        "MIT",
        "480 responses, 265 red",
        "response_test_ood.json",
        "db75284aebfe4573c9dd542b8dde48c7c656b7a07bc333d894d6af9392266b95",
    ),
    Source(
        "eval.advbench",
        "AdvBench (arXiv 2307.15043)",
        "github.com/llm-attacks/llm-attacks: data/advbench/harmful_behaviors.csv",
        "MIT",
        "520 attacks",
        "harmful_behaviors.csv",
        "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
    ),
    Source(
        "eval.hhh",
        "HHH, 438 comparisons (arXiv 2212.08073)",
        "github.com/anthropics/ConstitutionalHarmlessnessPaper: evals/438HHHEvaluations.jsonl",
        "none stated",
        "438 items, always (A) scores 52.05 %",
        "438HHHEvaluations.jsonl",
        "d1ee180289d3eeeb314ad862344cbd9af07f19c6d52a77524f9a1a21e7373c10",
    ),
    Source(
        "eval.mt_bench",
        "MT-Bench questions (arXiv 2306.05685)",
        "github.com/lm-sys/FastChat: fastchat/llm_judge/data/mt_bench/question.jsonl",
        "Apache-2.0",
        "80 questions of two turns",
        "question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    Source(
        "eval.mt_bench_references",
        "MT-Bench reference answers",
        "github.com/lm-sys/FastChat: fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl",
        "Apache-2.0",
        "30 answers",
        "gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    Source(
        "judge.prompts",
        "MT-Bench judge prompts",
        "github.com/lm-sys/FastChat: fastchat/llm_judge/data/judge_prompts.jsonl",
        "Apache-2.0",
        "8 prompts, of which 4 are used",
        "judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
    Source(
        "eval.xstest",
        "XSTest v2 (arXiv 2308.01263)",
        "github.com/paul-rottger/exaggerated-safety: xstest_prompts.csv",
        "CC-BY-4.0",
        "250 safe and 200 unsafe prompts",
        "xstest_prompts.csv",
        "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    ),
    Source(
        "cai.constitution",
        "Principles of Anthropic's paper, as llm-swarm has them",
        "github.com/huggingface/llm-swarm: examples/constitutional-ai/ (the constitution named anthropic)",
        "MIT",
        "16 principles",
        "constitution_anthropic.json",
        "5129a36a404770ce5a103d8ffba7c476214f64b22a1095bd59f782f053d1639b",
    ),
    Source("model.path", "Llama 3.1 8B Instruct", "huggingface.co/meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1"),
    Source("guard.path", "Llama Guard 3 8B", "huggingface.co/meta-llama/Llama-Guard-3-8B", "Llama 3.1"),
)


def known_file(sha256: str) -> str | None:
    """Name of the tested public file with this SHA-256; None for any other file."""
    return next((source.name for source in SOURCES if source.sha256 and source.sha256 == sha256), None)


def is_published(key: str, sha256: str) -> bool:
    """Compare a file with the tested public one that ``key`` takes."""
    return any(source.key == key and source.sha256 == sha256 for source in SOURCES)


INTRODUCTION: Final = (
    "Files and models that fedsim takes by key. Nothing is downloaded: get each from its place, under its "
    "licence. A file with one of the SHA-256 below is the very file that the readers were tested on. "
    "Written by `python tools/sources_page.py`."
)


def page() -> str:
    """The page of sources: a table, and the hashes as ``sha256sum`` writes them."""
    head = ["key", "what", "where", "licence", "the tested file"]
    rows = [[f"`{s.key}`", s.name, s.place, s.licence, s.rows or "not tested"] for s in SOURCES]
    table = Table(head, rows, num_text=len(head)).markdown()
    hashes = "\n".join(f"{s.sha256}  {s.file}" for s in SOURCES if s.sha256)
    parts = ["# Public data and models", INTRODUCTION, table, "## Hashes", f"```text\n{hashes}\n```"]
    return "\n\n".join(parts) + "\n"
