"""fedsim's own benchmarks, in the order in which they are run and shown."""

from __future__ import annotations

from typing import Final

from fedsim.base.figures import Benchmarks
from fedsim.config import EvalConfig
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.benchmark import OwnBenchmark
from fedsim.evaluate.hhh import Hhh
from fedsim.evaluate.mt_bench import MtBench
from fedsim.evaluate.over_refusal import OverRefusal
from fedsim.evaluate.perplexity import HelpfulPerplexity

_CLASSES: Final[tuple[type[OwnBenchmark], ...]] = (AdvBench, Hhh, MtBench, OverRefusal, HelpfulPerplexity)

OWN: Final = {benchmark.name: benchmark for benchmark in _CLASSES}
"""Class by name, which is the last part of its configuration key."""

DESCRIBED: Final = Benchmarks(tuple(benchmark.describe_class() for benchmark in _CLASSES))
"""What tables and plots need to know of them."""


def chosen_figures(settings: EvalConfig) -> dict[str, str]:
    """Headline figure → the figure that it repeats: by the phrase rule and by the scorer of the configuration."""
    found: dict[str, str] = {}
    for benchmark in _CLASSES:
        found |= benchmark.chosen(settings)
    return found
