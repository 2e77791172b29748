"""The sections of ``summary.md`` below the headline table; each is empty where the rows hold nothing for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from fedsim.record import paper
from fedsim.record.metrics import Row
from fedsim.record.tables import NOT_MEASURED, Table, duration, gibibytes, measured, number, with_interval
from fedsim.record.timers import top_level_seconds

POINT_TITLES = {
    "pretrained": "pretrained",
    "before_cai": "before CAI",
    "after_cai": "after CAI",
    "global": "after training",
}

Section = list[str]
"""Markdown paragraphs, heading first."""


def evaluations(points: Mapping[str, Row]) -> Section:
    """Every figure that the evaluations recorded, one column a point: other phrase sets, scorers, collapse, cuts."""
    names: dict[str, None] = {}
    for row in points.values():
        names.update(dict.fromkeys(n for n in row if n.startswith("eval/") and measured(row, n) is not None))
    shown = [name for name in names if not name.endswith(("_low", "_high", "_count"))]  # these stand in cells
    if not shown:
        return []
    head = ["figure", *(POINT_TITLES[point] for point in points)]
    rows = [[name.removeprefix("eval/"), *(_figure(row, name) for row in points.values())] for name in shown]
    caption = "Shares in percent with [95 % interval] and count; an empty cell was not measured."
    return ["## Every evaluation figure", Table(head, rows).markdown(), caption]


def guard(rows: Sequence[Row], kind: str) -> Section:
    """The guard's figures beside the paper's Table 2: one line for each ``point`` that rows with guard figures name."""
    found = {str(row.get("point", "this run")): row for row in rows if measured(row, "guard/accuracy") is not None}
    if not found:
        return []
    names = ("accuracy", "precision", "recall", "hmean")
    lines = []
    for label, row in found.items():
        figures = [measured(row, f"guard/{name}") for name in names]
        before, after = (measured(row, f"guard/red_share_{when}") for when in ("before", "after"))
        cells = [f"{value:.1f}" if value is not None else "undefined" for value in (*figures, before, after)]
        lines.append([f"{kind.replace('_', ' ')}, {label}", *cells, _dropped(row)])
    for label, published in paper.TABLE_2.items():
        figures = [published.accuracy, published.precision, published.recall, published.hmean]
        share = f"{100 * paper.RED_SHARE:.1f}"
        lines.append([f"paper: {label}", *(f"{value:.1f}" for value in figures), share, "", ""])
    head = ["guard", "accuracy %", "precision %", "recall %", "Hmean %", "red % before", "red % after", "rows dropped"]
    notes = ["Positive = red. Undefined: the guard called no row unsafe, or there was no red row."]
    last = list(found.values())[-1]
    for name, words in (("num_cut", "rows seen only in part"), ("num_empty_clients", "clients left without rows")):
        count = measured(last, f"guard/{name}")
        if count is not None:
            notes.append(f"{words[0].upper()}{words[1:]}: {number(count)}.")
    return ["## Guard", Table(head, lines).markdown(), " ".join(notes)]


def clients(rows: Sequence[Row]) -> Section:
    """Local training: losses of the first and last round, counts over all rounds."""
    return _round_section("## Clients", rows, "client/", counts="total")


def cai(rows: Sequence[Row]) -> Section:
    """CAI's rows (usable, dropped by reason) and its losses, margins and accuracies."""
    return _round_section("## Constitutional AI", rows, "cai/", counts="latest")


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
    total = sum(sum(top_level_seconds(row).values()) for row in rows)
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
    idle = _values(rows, "parallel/idle_share")
    tokens = _values(rows, "perf/tokens_per_s")
    memory = _values(rows, "perf/peak_rss_bytes")
    lines = []
    if tokens:
        lines.append(f"- training speed, mean over rounds: {number(fmean(tokens))} tokens/s")
    if idle:
        lines.append(f"- idle share of the ranks while clients trained, mean over rounds: {100 * fmean(idle):.1f} %")
    if memory:
        lines.append(f"- peak resident memory of all processes: {gibibytes(max(memory))}")
    return ["\n".join(lines)] if lines else []


def _round_section(title: str, rows: Sequence[Row], prefix: str, counts: str) -> Section:
    """First and last value of every figure under ``prefix``, of ``num_`` ones the sum or the latest.

    Figures of single clients (``client/loss_003``) stay in the metric rows.
    """
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row if name.startswith(prefix)))
    lines = []
    for name in names:
        values = _values(rows, name)
        short = name.removeprefix(prefix)
        if short.rpartition("_")[2].isdigit():
            continue
        if values and short.startswith("num_"):
            lines.append([short, "", "", number(sum(values) if counts == "total" else values[-1])])
        elif values:
            lines.append([short, number(values[0]), number(values[-1]), ""])
    if not lines:
        return []
    head = ["figure", "first", "last", "over all rounds" if counts == "total" else "latest count"]
    return [title, Table(head, lines).markdown()]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := measured(row, name)) is not None]


def _figure(row: Row, name: str) -> str:
    """Figure, interval and count; a rate without a count of its own has its benchmark's."""
    value = measured(row, name)
    if value is None:
        return ""
    count = measured(row, f"{name}_count")
    if measured(row, f"{name}_low") is None:
        return number(value, 4) if count is None else f"{number(value, 4)} of {number(count)}"
    if count is None:
        count = measured(row, f"{name.partition('_')[0]}_count")
    text = with_interval(row, name, 2)
    return text if count is None else f"{text} of {number(count)}"


def _dropped(row: Row) -> str:
    dropped, total = measured(row, "guard/num_dropped"), measured(row, "guard/num_rows")
    if dropped is None or not total:
        return NOT_MEASURED
    return f"{number(dropped)} of {number(total)} ({100 * dropped / total:.1f} %)"
