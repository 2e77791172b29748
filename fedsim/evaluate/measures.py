"""Figures under metric names, with intervals and counts, alike for every benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsim.base.figures import Figure, figure_of
from fedsim.evaluate.collapse import Collapse, measure_collapse
from fedsim.evaluate.intervals import Mean, Rate
from fedsim.generate.engine import Reply

Metrics = dict[str, float | int]

Found = Rate | Mean | float | int
"""A figure as it was found: with or without an interval."""


def rate_metrics(name: str, rate: Rate) -> Metrics:
    """A rate in percent and its 95 % interval: ``name``, ``name_low``, ``name_high``."""
    low, high = rate.percent_interval
    return {name: rate.percent, f"{name}_low": low, f"{name}_high": high}


def mean_metrics(name: str, mean: Mean, scale: tuple[float, float] | None) -> Metrics:
    """A mean and its interval, likewise.

    Student's interval knows no scale and is cut to it; values that are all alike give none.
    """
    if mean.low >= mean.high:
        return {name: mean.value}
    low, high = (mean.low, mean.high) if scale is None else (max(mean.low, scale[0]), min(mean.high, scale[1]))
    return {name: mean.value, f"{name}_low": low, f"{name}_high": high}


def figure_metrics(found: Mapping[str, Found], known: Mapping[str, Figure]) -> Metrics:
    """Figures as ``eval/…``, rates and means with interval and count; a count that several share
    stands once.

    Args:
        found: by name, without ``eval/``.
        known: the figures that a benchmark declares, by name; each also stands for its variants.
    """
    metrics: Metrics = {}
    for name, value in found.items():
        metric = f"eval/{name}"
        figure = figure_of(name, known)
        count = f"{metric}_count"
        if figure is not None and figure.count:
            count = figure.count_metric
        if isinstance(value, Rate):
            metrics |= rate_metrics(metric, value)
            metrics.setdefault(count, value.total)
        elif isinstance(value, Mean):
            metrics |= mean_metrics(metric, value, None if figure is None else figure.scale)
            metrics.setdefault(count, value.count)
        else:
            metrics[metric] = value
    return metrics


def reply_metrics(name: str, replies: Sequence[Reply]) -> Metrics:
    """What is counted of replies (at least one): those cut at the limit, prompts cut to the
    context, replies without text, mean length in tokens (the end of turn included), and signs of
    collapse.
    """
    return {
        f"{name}_truncated": sum(reply.truncated for reply in replies),
        f"{name}_prompts_truncated": sum(reply.prompt_truncated for reply in replies),
        f"{name}_empty": sum(not reply.text for reply in replies),
        f"{name}_mean_tokens": sum(reply.num_tokens for reply in replies) / len(replies),
        **collapse_metrics(name, measure_collapse([reply.text for reply in replies])),
    }


def collapse_metrics(name: str, collapse: Collapse) -> Metrics:
    """Shares in percent, length in words and the number of texts: ``name_distinct_2``,
    ``name_num_texts`` and so on.
    """
    return {
        f"{name}_num_texts": collapse.num_texts,
        f"{name}_distinct_2": 100 * collapse.distinct_2,
        f"{name}_repeated_suffix": 100 * collapse.repeated_suffix,
        f"{name}_mean_words": collapse.mean_words,
        f"{name}_empty_share": 100 * collapse.empty,
    }
