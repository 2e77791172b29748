"""Conversion of every benchmark's figures to metrics, with intervals and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsim.base.figures import Figure, figure_of
from fedsim.evaluate.collapse import Collapse, measure_collapse
from fedsim.evaluate.intervals import Mean, Rate
from fedsim.generate.engine import Reply

Metrics = dict[str, float | int]

Found = Rate | Mean | float | int
"""Value of a figure, with or without an interval."""


def rate_metrics(name: str, rate: Rate) -> Metrics:
    """Convert a rate to percent and its 95 % interval: ``name``, ``name_low``, ``name_high``."""
    low, high = rate.percent_interval
    return {name: rate.percent, f"{name}_low": low, f"{name}_high": high}


def mean_metrics(name: str, mean: Mean, scale: tuple[float, float] | None) -> Metrics:
    """Convert a mean and its interval: ``name``, ``name_low``, ``name_high``.

    Args:
        name: of the metric.
        mean: with Student's interval; without an interval if all values are equal.
        scale: lowest and highest possible value, to which the interval is cut; None for no limits.
    """
    # An interval without width says nothing.
    if mean.low >= mean.high:
        return {name: mean.value}
    low, high = mean.low, mean.high
    if scale is not None:
        low, high = max(low, scale[0]), min(high, scale[1])
    return {name: mean.value, f"{name}_low": low, f"{name}_high": high}


def figure_metrics(found: Mapping[str, Found], known: Mapping[str, Figure]) -> Metrics:
    """Convert figures to metrics ``eval/…``, rates and means with interval and count.

    A count that several figures share is written once.

    Args:
        found: by name, without ``eval/``.
        known: the figures that a benchmark declares, by name; each also covers its variants.
    """
    metrics: Metrics = {}
    for name, value in found.items():
        metric = f"eval/{name}"

        # The declaration gives the scale and the name of the count; both have a default.
        count, scale = f"{metric}_count", None
        figure = figure_of(name, known)
        if figure is not None:
            scale = figure.scale
            if figure.count:
                count = figure.count_metric

        if isinstance(value, Rate):
            metrics |= rate_metrics(metric, value)
            metrics.setdefault(count, value.total)
        elif isinstance(value, Mean):
            metrics |= mean_metrics(metric, value, scale)
            metrics.setdefault(count, value.count)
        else:
            metrics[metric] = value
    return metrics


def reply_metrics(name: str, replies: Sequence[Reply]) -> Metrics:
    """Count properties of replies, of which there is at least one.

    They are replies cut at the limit, prompts cut to the context, replies without text, mean length
    in tokens (the end of turn included), and signs of collapse.
    """
    return {
        f"{name}_truncated": sum(reply.truncated for reply in replies),
        f"{name}_prompts_truncated": sum(reply.prompt_truncated for reply in replies),
        f"{name}_empty": sum(not reply.text for reply in replies),
        f"{name}_mean_tokens": sum(reply.num_tokens for reply in replies) / len(replies),
        **collapse_metrics(name, measure_collapse([reply.text for reply in replies])),
    }


def collapse_metrics(name: str, collapse: Collapse) -> Metrics:
    """Convert collapse figures to metrics ``name_num_texts``, ``name_distinct_2`` and so on.

    Shares are in percent and the length is in words.
    """
    return {
        f"{name}_num_texts": collapse.num_texts,
        f"{name}_distinct_2": 100 * collapse.distinct_2,
        f"{name}_repeated_suffix": 100 * collapse.repeated_suffix,
        f"{name}_mean_words": collapse.mean_words,
        f"{name}_empty_share": 100 * collapse.empty,
    }
