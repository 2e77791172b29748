"""The built-in benchmarks, in the order in which they are run and shown."""

from __future__ import annotations

from typing import Final

from fedsim.base.figures import Benchmarks
from fedsim.config import EvalConfig
from fedsim.evaluate.benchmark import OwnBenchmark
from fedsim.extend import KINDS, load

KEY: Final = "eval.benchmarks.kind"

OWN: Final[dict[str, type[OwnBenchmark]]] = {name: load(KEY, name) for name in KINDS[KEY].own}
"""Class by name, which is the last part of its configuration key."""

DESCRIBED: Final = Benchmarks(tuple(benchmark.describe_class() for benchmark in OWN.values()))
"""Their descriptions for tables and plots."""


def chosen_figures(settings: EvalConfig) -> dict[str, str]:
    """Map each headline figure to the figure that it repeats.

    The phrase rule and the scorer of the configuration choose it.
    """
    # Names of figures, without ``eval/``.
    found: dict[str, str] = {}
    for benchmark in OWN.values():
        found |= benchmark.chosen(settings)
    return found
