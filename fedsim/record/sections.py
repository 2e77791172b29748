"""The sections of ``summary.md`` below the headline table; each is empty where the rows hold nothing for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from fedsim.record.metrics import Row
from fedsim.record.tables import Table, byte_size, duration, measured, number
from fedsim.record.timers import top_level_seconds

POINT_TITLES = {
    "pretrained": "pretrained",
    "before_cai": "before CAI",
    "after_cai": "after CAI",
    "global": "after training",
}

Section = list[str]
"""Markdown paragraphs, heading first."""

#: What an evaluation figure is measured in, by its name; one that matches none is a plain number of things.
UNITS = (
    (
        re.compile(
            r"advbench_(harmless\w*|grammatical|guard_safe)|xstest_(safe|unsafe)_(refused\w*|guard_safe)"
            r"|xstest_type_\w+_refused|hhh_(accuracy|always_a|letter|generate|likelihood)"
            r"|\w+_(picks_a|one_order|distinct_2|repeated_suffix|empty_share)"
        ),
        " %",
    ),
    (re.compile(r"harmful_response|critique_finds_harm|repaired_revision"), " %"),
    (re.compile(r"mt_bench|mt_bench_(turn|category)_.+"), " points"),
    (re.compile(r"\w+_mean_tokens"), " tokens"),
    (re.compile(r"\w+_mean_words"), " words"),
)

#: The part of a figure's name whose count a share without its own is one of.
COUNTED = re.compile(r"eval/(xstest_(safe|unsafe)(?=_refused)|[^_]+)")

#: Shares of texts: their count stands beside them as ``…_num_texts``.
OF_TEXTS = re.compile(r"(.+)_(?:repeated_suffix|empty_share)")

#: A figure of one client, such as loss_003.
CLIENT = re.compile(r"\w+_\d{3,}")

#: Figures of the clients' table that a sum over rounds would misrepresent → how their mean a round is labelled.
MEANS = {"num_rows": "rows held by a round's clients, mean a round"}


def evaluations(points: Mapping[str, Row]) -> Section:
    """Every figure that the evaluations recorded, one column a point, with units, intervals and counts."""
    names: dict[str, None] = {}
    for row in points.values():
        names.update(dict.fromkeys(n for n in row if n.startswith("eval/") and measured(row, n) is not None))
    shown = [name for name in names if not name.endswith(("_low", "_high", "_count"))]  # these stand in cells
    if not shown:
        return []
    head = ["figure", *(POINT_TITLES[point] for point in points)]
    rows = [[name.removeprefix("eval/"), *(_figure(row, name) for row in points.values())] for name in shown]
    caption = (
        "[low, high] = 95 % interval, where there is one; n or of = how many items, replies, questions or choices the "
        "figure is taken over; a figure without a unit is a number of things; an empty cell was not measured. "
        "Intervals of MT-Bench end at 1 and 10, and there is none where all questions have one score."
    )
    return ["## Every evaluation figure", Table(head, rows).markdown(), f"{caption}{_about_strict(points)}"]


def clients(rows: Sequence[Row]) -> Section:
    """Local training: losses of the first and last round, counts over all rounds."""
    return _round_section("## Clients", rows, "client/", counts="total", means=MEANS)


def cai(rows: Sequence[Row]) -> Section:
    """CAI's rows (usable, dropped by reason) and its losses, margins and accuracies."""
    return _round_section("## Constitutional AI", rows, "cai/", counts="latest", means={})


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


def _round_section(title: str, rows: Sequence[Row], prefix: str, counts: str, means: Mapping[str, str]) -> Section:
    """First and last value of every figure under ``prefix``, of ``num_`` ones the sum or the latest.

    Of the figures that ``means`` labels, the mean over the rounds that have them stands for the sum. Figures of single
    clients (``client/loss_003``) stay in the metric rows.
    """
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row if name.startswith(prefix)))
    lines = []
    for name in names:
        values = _values(rows, name)
        short = name.removeprefix(prefix)
        if CLIENT.fullmatch(short) or short.endswith(("_low", "_high", "_count")):
            continue
        if values and short in means:
            lines.append([means[short], "", "", number(fmean(values))])
        elif values and short.startswith("num_"):
            lines.append([short, "", "", number(sum(values) if counts == "total" else values[-1])])
        elif values:
            texts = OF_TEXTS.fullmatch(name)
            counts_of = _values(rows, f"{texts[1]}_num_texts" if texts else f"{name}_count")
            of = f" of {number(counts_of[-1])}" if counts_of else ""
            lines.append([short, *(f"{number(value)}{_unit(short)}{of}" for value in (values[0], values[-1])), ""])
    if not lines:
        return []
    head = ["figure", "first", "last", "over all rounds" if counts == "total" else "latest count"]
    return [title, Table(head, lines).markdown()]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := measured(row, name)) is not None]


def _unit(short: str) -> str:
    """What a figure is measured in, by its name without the stage."""
    return next((unit for names, unit in UNITS if names.fullmatch(short)), "")


def _figure(row: Row, name: str) -> str:
    """Figure with unit, interval and count; a share without a count of its own has its benchmark's.

    A share is one ``of`` its count (``45 % of 40``), a mean is over ``n`` things.
    """
    value = measured(row, name)
    if value is None:
        return ""
    unit = _unit(name.removeprefix("eval/"))
    low, high, count = (measured(row, name + ending) for ending in ("_low", "_high", "_count"))
    if count is None and unit == " %" and not name.endswith("_distinct_2"):  # the latter is a share of word pairs
        counted, texts = COUNTED.match(name), OF_TEXTS.fullmatch(name)
        count_name = f"{texts[1]}_num_texts" if texts else f"{counted[0]}_count" if counted else ""
        count = measured(row, count_name)
    bare = low is None or high is None
    text = f"{number(value, 4)}{unit}" if bare else f"{value:.2f}{unit} [{low:.2f}, {high:.2f}]"
    if count is None:
        return text
    return f"{text} of {number(count)}" if unit == " %" else f"{text}, n = {number(count)}"


def _about_strict(points: Mapping[str, Row]) -> str:
    """Why two rules differ that both stand in the table; only the embedded world's AdvBench has the second."""
    names = ("eval/advbench_harmless_strict", "eval/advbench_harmless_strict_world")
    if not any(all(measured(row, name) is not None for name in names) for row in points.values()):
        return ""
    return (
        " advbench_harmless_strict counts replies that begin with a refusal: in the embedded world's full style a "
        "reply begins with an opener such as thanks, so a careful one is harmless by strict_world, which reads all of "
        "it, and not by strict."
    )
