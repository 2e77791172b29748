"""The sections of ``summary.md`` below the headline table; each is empty without figures for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def _cai_figures() -> dict[str, Figure]:
    """Return the figures of CAI's conversations by name without ``cai/``."""
    found = [Figure(name.removeprefix("cai/"), title) for name, title in FINDINGS.items()]
    found += collapse_figures("response", "first responses")
    found += collapse_figures("revision", "revisions")
    return {figure.name: figure for figure in found}


CAI_FIGURES: Final = _cai_figures()
"""Figures of CAI's conversations, named without ``cai/``."""

#: Figures of the clients' table that a sum over rounds would misrepresent → label of their mean.
MEANS = {"num_rows": "rows held by a round's clients, mean a round"}


def values_of(rows: Iterable[Row], name: str) -> list[float]:
    """Return a figure's value in every row that has it, in the rows' order."""
    found = []
    for row in rows:
        value = measured(row, name)
        if value is not None:
            found.append(value)
    return found


def counts_of(rows: Iterable[Row], figure: Figure) -> str:
    """Return the number of items behind a figure, such as ``1,130``.

    Returns:
        Every number that a row has, ascending: ``120/130``; "" if none is known.
    """
    counts = sorted(set(values_of(rows, figure.count_metric)))
    return "/".join(f"{count:,.0f}" for count in counts)


def evaluations(points: Mapping[str, Row], benchmarks: Benchmarks) -> Section:
    """Every figure that the evaluations recorded, with units, intervals and counts.

    Args:
        points: row of each evaluation point, a column each.
    """
    # Metrics with a value at some point, each once, in the order in which they occur.
    names: dict[str, None] = {}
    for row in points.values():
        found = [n for n in row if n.startswith("eval/") and measured(row, n) is not None]
        names.update(dict.fromkeys(found))
    # Intervals and counts are shown in the cells of their figures.
    shown = [name for name in names if not name.endswith(("_low", "_high", "_count"))]
    if not shown:
        return []
    head = ["figure", *(POINT_TITLES[point] for point in points)]
    lines = []
    for name in shown:
        short = name.removeprefix("eval/")
        figure = benchmarks.of(short)
        cells = [_cell(row, name, figure) for row in points.values()]
        lines.append([short, *cells])
    # How to read the table, then the notes of figures that have no line of their own.
    words = [
        "[low, high] = 95 % interval, where there is one; n or of = how many items, replies, "
        "questions or choices the figure is taken over; a figure without a unit is a number of "
        "things; an empty cell was not measured. Intervals of MT-Bench end at 1 and 10, and there "
        "is none where all questions have one score."
    ]
    for figure in benchmarks.figures:
        if figure.note and not figure.line and figure.metric in names:
            words.append(figure.note)
    return ["## Every evaluation figure", Table(head, lines).markdown(), " ".join(words)]


def clients(rows: Sequence[Row]) -> Section:
    """Local training: losses of the first and last round, counts over all rounds."""
    return _round_section("## Clients", rows, "client/", counts="total", means=MEANS, figures={})


def cai(rows: Sequence[Row]) -> Section:
    """CAI's rows (usable, dropped by reason) and its losses, margins and accuracies."""
    heading = "## Constitutional AI"
    return _round_section(heading, rows, "cai/", counts="latest", means={}, figures=CAI_FIGURES)


def times(rows: Sequence[Row]) -> Section:
    """Time by phase over the whole run, nested phases under their parents; speed and memory."""
    seconds: dict[str, float] = {}  # by phase, such as "cai" and "cai/dpo"
    for row in rows:
        for name in row:
            value = measured(row, name)
            if name.startswith("time/") and name.endswith("_s") and value is not None:
                phase = name.removeprefix("time/").removesuffix("_s")
                seconds[phase] = seconds.get(phase, 0.0) + value
    if not seconds:
        return []
    # A line for each phase, nested ones below their parents; shares in percent of the total.
    total = total_seconds(rows)
    tops = [phase for phase in seconds if "/" not in phase]
    lines = []
    for top in sorted(tops, key=lambda phase: -seconds[phase]):  # the longest first
        nested = sorted(phase for phase in seconds if phase.startswith(f"{top}/"))
        for phase in [top, *nested]:
            share = f"{100 * seconds[phase] / total:.1f} %" if total else ""
            lines.append([f"{'– ' * phase.count('/')}{phase}", duration(seconds[phase]), share])
    lines.append(["all phases", duration(total), ""])
    table = Table(["phase", "time", "share"], lines).markdown()
    return ["## Time by phase", table, *_speed(rows)]


def _speed(rows: Sequence[Row]) -> Section:
    """Means over rounds of what was measured; of memory the maximum, of traffic the sum."""
    # Metric → title, and the words for its values, one a round.
    shown: Mapping[str, tuple[str, Callable[[Sequence[float]], str]]] = {
        "perf/tokens_per_s": (
            "training speed, mean over rounds",
            lambda values: f"{number(fmean(values))} tokens/s",
        ),
        "perf/mfu": ("model FLOPs utilisation of local training, mean over rounds", _percent),
        "perf/cai_mfu": (
            "model FLOPs utilisation of constitutional AI, mean over rounds",
            _percent,
        ),
        "parallel/idle_share": (
            "idle share of the ranks while clients trained, mean over rounds",
            _percent,
        ),
        "perf/peak_rss_bytes": (
            "peak resident memory of all processes",
            lambda values: byte_size(max(values)),
        ),
        "perf/peak_gpu_bytes": (
            "peak memory of the fullest GPU",
            lambda values: byte_size(max(values)),
        ),
        "parallel/comm_bytes": (
            "handed to collectives by all processes",
            lambda values: byte_size(sum(values)),
        ),
    }
    lines = []
    for name, (title, words) in shown.items():
        values = values_of(rows, name)
        if values:
            lines.append(f"- {title}: {words(values)}")
    with_peak = [row for row in rows if "perf/peak_source" in row]
    sources = dict.fromkeys(str(row["perf/peak_source"]) for row in with_peak)
    if sources:  # several where a run was resumed on other devices
        lines.append(f"- peak that utilisation refers to: {'; '.join(sources)}")
    if not lines:
        return []
    return ["\n".join(lines)]


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
    """First and last value of every figure under ``prefix``, of ``num_`` ones one count.

    Of the figures that ``means`` labels, the mean over the rounds that have them replaces the sum.
    Figures of single clients (``client/loss_003``) are left out.

    Args:
        counts: "total" for the sum over rounds of ``num_`` figures, "latest" for their last value.
        means: label by name of the figures whose mean is shown.
        figures: by name, of those that have a unit or another's count.
    """
    # Metrics under the prefix, each once, in the order in which they occur.
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row if name.startswith(prefix)))
    lines = []
    for name in names:
        values = values_of(rows, name)
        short = name.removeprefix(prefix)
        if not values or _is_of_client(short) or short.endswith(("_low", "_high", "_count")):
            continue
        # The cells are title, first value, last value, count.
        if short in means:
            lines.append([means[short], "", "", number(fmean(values))])
        elif short.startswith("num_"):
            count = sum(values) if counts == "total" else values[-1]
            lines.append([short, "", "", number(count)])
        else:
            ending = _unit_and_count(rows, prefix, short, figure_of(short, figures))
            first, last = number(values[0]), number(values[-1])
            lines.append([short, f"{first}{ending}", f"{last}{ending}", ""])
    if not lines:
        return []
    column = "over all rounds" if counts == "total" else "latest count"
    return [title, Table(["figure", "first", "last", column], lines).markdown()]


def _unit_and_count(rows: Sequence[Row], prefix: str, short: str, figure: Figure | None) -> str:
    """Unit of a figure and its latest count, as the ending of a value: `` % of 400``."""
    count_name = f"{short}_count"
    if figure is not None and figure.count:
        count_name = figure.count
    ending = _unit(figure)
    counts = values_of(rows, f"{prefix}{count_name}")
    if counts:
        ending += f" of {number(counts[-1])}"
    return ending


def _is_of_client(short: str) -> bool:
    """Tell a figure of one client, which ends in its number, such as ``loss_003``."""
    _, _, end = short.rpartition("_")
    return len(end) >= 3 and end.isdecimal()


def _unit(figure: Figure | None) -> str:
    """Unit of a figure, as the ending of its value."""
    if figure is None or not figure.unit:
        return ""
    return f" {figure.unit}"


def _cell(row: Row, name: str, figure: Figure | None) -> str:
    """Value with unit, interval and count; a share without a count of its own has its benchmark's.

    A share is one ``of`` its count (``45 % of 40``), a mean is over ``n`` things.
    """
    value = measured(row, name)
    if value is None:
        return ""
    unit = _unit(figure)
    # Value and interval.
    low, high = measured(row, f"{name}_low"), measured(row, f"{name}_high")
    text = f"{number(value, 4)}{unit}"
    if low is not None and high is not None:
        text = f"{value:.2f}{unit} [{low:.2f}, {high:.2f}]"
    # Count.
    count = measured(row, f"{name}_count")
    is_share = figure is not None and figure.is_share
    if count is None and figure is not None and is_share and figure.count:
        count = measured(row, figure.count_metric)
    if count is None:
        return text
    return f"{text} of {number(count)}" if is_share else f"{text}, n = {number(count)}"
