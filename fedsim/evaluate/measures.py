"""Rates and collapse figures under metric names, alike for every benchmark."""

from __future__ import annotations

from fedsim.evaluate.collapse import Collapse
from fedsim.evaluate.intervals import Rate

Metrics = dict[str, float | int]


def rate_metrics(name: str, rate: Rate) -> Metrics:
    """A rate in percent and its 95 % interval: ``name``, ``name_low``, ``name_high``."""
    low, high = rate.percent_interval
    return {name: rate.percent, f"{name}_low": low, f"{name}_high": high}


def collapse_metrics(name: str, collapse: Collapse) -> Metrics:
    """Shares in percent, length in words and the number of texts: ``name_distinct_2``, ``name_num_texts`` and so on."""
    return {
        f"{name}_num_texts": collapse.num_texts,
        f"{name}_distinct_2": 100 * collapse.distinct_2,
        f"{name}_repeated_suffix": 100 * collapse.repeated_suffix,
        f"{name}_mean_words": collapse.mean_words,
        f"{name}_empty_share": 100 * collapse.empty,
    }
