"""Public data sets and models: addresses, licences, and the files that readers were tested on."""

from __future__ import annotations

from itertools import chain

from fedsim.base.figures import Source
from fedsim.evaluate.own import OWN

_KOREAN = "github.com/naver-ai/korean-safety-benchmarks"
_SWARM = "github.com/huggingface/llm-swarm"

_SQUARE = Source(
    "data.square",
    "SQuARe, responses (arXiv 2305.17696)",
    f"{_KOREAN}: data/SQuARe/ (the train split for the paper's runs)",
    "MIT",
    "480 responses, 265 red",
    "response_test_ood.json",
    "db75284aebfe4573c9dd542b8dde48c7c656b7a07bc333d894d6af9392266b95",
)
# Published files and models that belong to no benchmark.
_OTHERS = (
    Source(
        "cai.constitution",
        "Principles of Anthropic's paper, as llm-swarm has them",
        f"{_SWARM}: examples/constitutional-ai/ (the constitution named anthropic)",
        "MIT",
        "16 principles",
        "constitution_anthropic.json",
        "5129a36a404770ce5a103d8ffba7c476214f64b22a1095bd59f782f053d1639b",
    ),
    Source(
        "model.path",
        "Llama 3.1 8B Instruct",
        "huggingface.co/meta-llama/Llama-3.1-8B-Instruct",
        "Llama 3.1",
    ),
    Source(
        "guard.path",
        "Llama Guard 3 8B",
        "huggingface.co/meta-llama/Llama-Guard-3-8B",
        "Llama 3.1",
    ),
)

SOURCES = (
    _SQUARE,
    *chain.from_iterable(benchmark.sources for benchmark in OWN.values()),
    *_OTHERS,
)
"""The clients' rows, every benchmark's files, and the others."""


def known_file(sha256: str) -> str | None:
    """Find the name of the tested public file with this SHA-256; None for any other file."""
    for source in SOURCES:
        if source.sha256 and source.sha256 == sha256:
            return source.name
    return None
