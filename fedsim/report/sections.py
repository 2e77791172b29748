"""The sections of ``summary.md`` below the headline table; each is empty where the rows hold nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Final

from fedsim.base.figures import Benchmarks, Figure, collapse_figures, figure_of
from fedsim.base.tables import Table, byte_size, duration, measured, number
from fedsim.record.metrics import Row
from fedsim.record.timers import total_seconds
from fedsim.report.cai_line import FINDINGS

POINT_TITLES = {
    "pretrained": "pretrained",
    "before_cai": "before CAI",
    "after_cai": "after CAI",
    "global": "after training",
}

Section = list[str]
"""Markdown paragraphs, heading first."""

CAI_FIGURES: Final = {
    figure.name: figure
    for figure in (
        *(Figure(name.removeprefix("cai/"), title) for name, title in FINDINGS.items()),
        *collapse_figures("response", "first responses"),
        *collapse_figures("revision", "revisions"),
    )
}
"""Figures of CAI's conversations, named without ``cai/``."""

#: Figures of the clients' table that a sum over rounds would misrepresent → how their mean a round is labelled.
MEANS = {"num_rows": "rows held by a round's clients, mean a round"}


def evaluations(points: Mapping[str, Row], benchmarks: Benchmarks) -> Section:
    """Every figure that the evaluations recorded, one column a point, with units, intervals and counts."""
    names: dict[str, None] = {}
    for row in points.values():
        names.update(dict.fromkeys(n for n in row if n.startswith("eval/") and measured(row, n) is not None))
    shown = [name for name in names if not name.endswith(("_low", "_high", "_count"))]  # these stand in cells
    if not shown:
        return []
    head = ["figure", *(POINT_TITLES[point] for point in points)]
    rows = []
    for name in shown:
        short = name.removeprefix("eval/")
        figure = benchmarks.of(short)
        rows.append([short, *(_cell(row, name, figure) for row in points.values())])
    caption = (
        "[low, high] = 95 % interval, where there is one; n or of = how many items, replies, questions or choices the "
        "figure is taken over; a figure without a unit is a number of things; an empty cell was not measured. "
        "Intervals of MT-Bench end at 1 and 10, and there is none where all questions have one score."
    )
    notes = [figure.note for figure in benchmarks.figures if figure.note and not figure.line and figure.metric in names]
    return ["## Every evaluation figure", Table(head, rows).markdown(), " ".join([caption, *notes])]


def clients(rows: Sequence[Row]) -> Section:
    """Local training: losses of the first and last round, counts over all rounds."""
    return _round_section("## Clients", rows, "client/", counts="total", means=MEANS, figures={})


def cai(rows: Sequence[Row]) -> Section:
    """CAI's rows (usable, dropped by reason) and its losses, margins and accuracies."""
    return _round_section("## Constitutional AI", rows, "cai/", counts="latest", means={}, figures=CAI_FIGURES)


def times(rows: Sequence[Row]) -> Section:
    """Seconds by phase over the whole run, nested phases under their parents, and speed and memory."""
    seconds: dict[str, float] = {}
    for row in rows:
        for name in row:
            value = measured(row, name)
            if name.startswith("time/") and name.endswith("_s") and value is not None:
                phase = name.removeprefix("time/").removesuffix("_s")
                seconds[phase] = seconds.get(phase, 0.0) + value
    if not seconds:
        return []
    total = total_seconds(rows)
    tops = sorted((phase for phase in seconds if "/" not in phase), key=lambda phase: -seconds[phase])
    lines = []
    for top in tops:
        for phase in [top, *sorted(p for p in seconds if p.startswith(f"{top}/"))]:
            share = f"{100 * seconds[phase] / total:.1f} %" if total else ""
            lines.append([f"{'– ' * phase.count('/')}{phase}", duration(seconds[phase]), share])
    lines.append(["all phases", duration(total), ""])
    table = Table(["phase", "time", "share"], lines).markdown()
    return ["## Time by phase", table, *_speed(rows)]


def _speed(rows: Sequence[Row]) -> Section:
    """Means over rounds of what was measured; memory is the most that any round took, traffic the sum."""
    shown: Mapping[str, tuple[str, Callable[[Sequence[float]], str]]] = {
        "perf/tokens_per_s": ("training speed, mean over rounds", lambda v: f"{number(fmean(v))} tokens/s"),
        "perf/mfu": ("model FLOPs utilisation of local training, mean over rounds", _percent),
        "perf/cai_mfu": ("model FLOPs utilisation of constitutional AI, mean over rounds", _percent),
        "parallel/idle_share": ("idle share of the ranks while clients trained, mean over rounds", _percent),
        "perf/peak_rss_bytes": ("peak resident memory of all processes", lambda v: byte_size(max(v))),
        "perf/peak_gpu_bytes": ("peak memory of the fullest GPU", lambda v: byte_size(max(v))),
        "parallel/comm_bytes": ("handed to collectives by all processes", lambda v: byte_size(sum(v))),
    }
    lines = [f"- {title}: {shape(v)}" for name, (title, shape) in shown.items() if (v := _values(rows, name))]
    sources = dict.fromkeys(str(row["perf/peak_source"]) for row in rows if "perf/peak_source" in row)
    if sources:  # several where a run was resumed on other devices
        lines.append(f"- peak that utilisation refers to: {'; '.join(sources)}")
    return ["\n".join(lines)] if lines else []


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.1f} %"


def _round_section(
    title: str,
    rows: Sequence[Row],
    prefix: str,
    counts: str,
    means: Mapping[str, str],
    figures: Mapping[str, Figure],
) -> Section:
    """First and last value of every figure under ``prefix``, of ``num_`` ones the sum or the latest.

    Of the figures that ``means`` labels, the mean over the rounds that have them stands for the sum. Figures of single
    clients (``client/loss_003``) stay in the metric rows.

    Args:
        figures: by name, of those that have a unit or another's count.
    """
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row if name.startswith(prefix)))
    lines = []
    for name in names:
        values = _values(rows, name)
        short = name.removeprefix(prefix)
        if not values or _is_of_client(short) or short.endswith(("_low", "_high", "_count")):
            continue
        if short in means:
            lines.append([means[short], "", "", number(fmean(values))])
        elif short.startswith("num_"):
            lines.append([short, "", "", number(sum(values) if counts == "total" else values[-1])])
        else:
            figure = figure_of(short, figures)
            count_name = figure.count if figure is not None and figure.count else f"{short}_count"
            counts_of = _values(rows, f"{prefix}{count_name}")
            unit = _unit(figure)
            of = f" of {number(counts_of[-1])}" if counts_of else ""
            lines.append([short, *(f"{number(value)}{unit}{of}" for value in (values[0], values[-1])), ""])
    if not lines:
        return []
    head = ["figure", "first", "last", "over all rounds" if counts == "total" else "latest count"]
    return [title, Table(head, lines).markdown()]


def _is_of_client(short: str) -> bool:
    """A figure of one client ends in its number, such as ``loss_003``."""
    _, _, end = short.rpartition("_")
    return len(end) >= 3 and end.isdecimal()


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := measured(row, name)) is not None]


def _unit(figure: Figure | None) -> str:
    """What a figure is measured in, behind its value."""
    return f" {figure.unit}" if figure is not None and figure.unit else ""


def _cell(row: Row, name: str, figure: Figure | None) -> str:
    """Value with unit, interval and count; a share without a count of its own has its benchmark's.

    A share is one ``of`` its count (``45 % of 40``), a mean is over ``n`` things.
    """
    value = measured(row, name)
    if value is None:
        return ""
    unit = _unit(figure)
    low, high, count = (measured(row, name + ending) for ending in ("_low", "_high", "_count"))
    is_share = figure is not None and figure.is_share
    if count is None and figure is not None and is_share and figure.count:
        count = measured(row, figure.count_metric)
    bare = low is None or high is None
    text = f"{number(value, 4)}{unit}" if bare else f"{value:.2f}{unit} [{low:.2f}, {high:.2f}]"
    if count is None:
        return text
    return f"{text} of {number(count)}" if is_share else f"{text}, n = {number(count)}"
