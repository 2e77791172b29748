"""Rates and collapse figures under metric names, alike for every benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsim.evaluate.collapse import Collapse
from fedsim.evaluate.intervals import Rate

Metrics = dict[str, float | int]

Items = dict[str, list[float]]
"""One value an item (0 or 1, or points), in the order of the items asked, by figure: a metric's name without "eval/".

Their mean is the metric (of 0 and 1: its percent / 100).
"""


def rate_metrics(name: str, rate: Rate) -> Metrics:
    """A rate in percent and its 95 % interval: ``name``, ``name_low``, ``name_high``."""
    low, high = rate.percent_interval
    return {name: rate.percent, f"{name}_low": low, f"{name}_high": high}


def flag_items(named: Mapping[str, Sequence[bool]]) -> Items:
    """Flags as items of 0 and 1."""
    return {name: [float(flag) for flag in flags] for name, flags in named.items()}


def collapse_metrics(name: str, collapse: Collapse) -> Metrics:
    """Shares in percent, length in words and the number of texts: ``name_distinct_2``, ``name_num_texts`` and so on."""
    return {
        f"{name}_num_texts": collapse.num_texts,
        f"{name}_distinct_2": 100 * collapse.distinct_2,
        f"{name}_repeated_suffix": 100 * collapse.repeated_suffix,
        f"{name}_mean_words": collapse.mean_words,
        f"{name}_empty_share": 100 * collapse.empty,
    }
