"""Pictures of a run, drawn from its metric rows: losses, safety, helpfulness and time by phase.

A picture whose figures no row holds is not drawn. Rounds are counted from 1, as in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.base.figures import Benchmarks
from fedsim.base.figures import Figure as Measured
from fedsim.base.tables import duration, measured
from fedsim.record.metrics import RESUME, Row
from fedsim.record.timers import top_level_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PHASE_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip

#: Evaluation point → label, colour, marker, and shift along the round axis, in rounds, so that
#: error bars do not cover each other.
POINTS = {
    "before_cai": ("before CAI", ORANGE, "v", -0.07),
    "after_cai": ("after CAI", BLUE, "o", 0.07),
    "global": ("no CAI in the round", GREEN, "s", 0.0),
}

#: Least height of a loss axis, in nats, so that noise is not drawn as a trend.
MIN_LOSS_SPAN = 0.05


def write_plots(
    rows: Sequence[Row],
    directory: Path,
    title: str,
    benchmarks: Benchmarks,
) -> list[Path]:
    """Draw every picture that the rows have figures for.

    Args:
        rows: the run's metric rows, oldest first.
        directory: folder of the PNG files: ``loss.png``, ``safety.png``, ``helpfulness.png``,
            ``time.png``.
        title: the run in a few words; each picture's title begins with it.
        benchmarks: of the run.

    Returns:
        The files written, in that order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # File name without its ending → function that draws it.
    drawings: dict[str, Callable[[], Figure | None]] = {
        "loss": lambda: plot_losses(rows, title),
        "safety": lambda: plot_safety(rows, title, benchmarks),
        "helpfulness": lambda: plot_helpfulness(rows, title, benchmarks),
        "time": lambda: plot_times(rows, title),
    }
    written = []
    for name, draw in drawings.items():
        figure = draw()
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def plot_losses(rows: Sequence[Row], title: str) -> Figure | None:
    """Draw training losses by round: next-token losses on the left, DPO's on the right.

    DPO's loss has another scale, and a panel of its own.
    """
    # Metric → label, colour, marker of its line.
    token = {
        "client/loss": ("clients (SFT on own rows)", BLUE, "o"),
        "cai/sft_loss": ("CAI, SFT", GREEN, "s"),
    }
    pair = {"cai/dpo_loss": ("CAI, DPO", ORANGE, "^")}
    # A panel for each unit that the rows have losses in.
    panels = []
    for lines, unit in ((token, "loss, nats per token"), (pair, "loss, nats per pair")):
        if any(series(rows, name) for name in lines):
            panels.append((lines, unit))
    if not panels:
        return None
    figure, all_axes = canvas(len(panels), f"{title}: training loss by round")
    for axes, (lines, unit) in zip(all_axes, panels, strict=True):
        for name, (label, color, marker) in lines.items():
            points = series(rows, name)
            if points:
                places, losses = zip(*points, strict=True)
                axes.plot(places, losses, color=color, marker=marker, markersize=4, label=label)
        round_axis(axes, [row["round"] for row in rows if not lines.keys().isdisjoint(row)])
        _widen(axes, MIN_LOSS_SPAN)
        axes.set_ylabel(unit)
        legend_below(axes)
    return figure


def plot_safety(rows: Sequence[Row], title: str, benchmarks: Benchmarks) -> Figure | None:
    """Draw headline shares and their controls, before and after CAI, with 95 % intervals.

    The pretrained model's level is a dashed line.
    """
    shown = [figure for figure in benchmarks.plotted if figure.is_share]
    return _evaluations(rows, f"{title}: safety, with 95 % intervals", shown)


def plot_helpfulness(rows: Sequence[Row], title: str, benchmarks: Benchmarks) -> Figure | None:
    """Draw headline figures in other units, such as MT-Bench from 1 to 10, likewise."""
    shown = [figure for figure in benchmarks.plotted if not figure.is_share]
    return _evaluations(rows, f"{title}: helpfulness, with 95 % interval", shown)


def plot_times(rows: Sequence[Row], title: str) -> Figure | None:
    """Draw the seconds of each round, stacked by phase; the preparation of all sessions is at 0."""
    rounds = _phase_seconds(rows)
    if not rounds:
        return None
    figure, (axes,) = canvas(1, f"{title}: time by phase")
    bottoms = [0.0] * len(rounds)  # seconds below the next phase's bars
    # A layer of bars for each phase; there are no more groups than colours.
    for color, (name, group) in zip(PHASE_COLORS, _phase_groups(rounds).items(), strict=False):
        heights = []  # seconds
        for phases in rounds.values():
            heights.append(sum(phases.get(phase, 0.0) for phase in group))
        label = f"{name}, {duration(sum(heights))}"
        axes.bar(list(rounds), heights, 0.8, bottom=bottoms, color=color, label=label)
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    round_axis(axes, list(rounds))
    if 0 in rounds:
        axes.set_xlabel("round (0 = preparation)")
    axes.set_ylabel("seconds")
    axes.set_ylim(0.0, 1.05 * max(bottoms) or 1.0)
    # The legend in the order of the stack, top first.
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        title="phase, total",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),  # outside the axes, on the right
    )
    return figure


def _phase_seconds(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Return the seconds by round and phase; rounds without any are left out.

    Rounds are counted from 1; 0 is the preparation, also of resumed sessions.
    """
    rounds: dict[int, dict[str, float]] = {}
    for row in rows:
        place = row["round"]
        if row["stage"] == RESUME:
            place = 0
        for phase, seconds in top_level_seconds(row).items():
            into = rounds.setdefault(place, {})
            into[phase] = into.get(phase, 0.0) + seconds
    return dict(sorted(rounds.items()))


def _phase_groups(rounds: Mapping[int, Mapping[str, float]]) -> dict[str, list[str]]:
    """Return label → phases, the longest first.

    There are as many as colours at most: the shortest phases are one group then, "other".
    """
    # Seconds of each phase over all rounds.
    totals: dict[str, float] = {}
    for phases in rounds.values():
        for phase, seconds in phases.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    ordered = sorted(totals, key=lambda phase: -totals[phase])
    num_shown = len(ordered)
    if num_shown > len(PHASE_COLORS):
        num_shown = len(PHASE_COLORS) - 1
    groups = {phase.replace("_", " "): [phase] for phase in ordered[:num_shown]}
    if num_shown < len(ordered):
        groups["other"] = ordered[num_shown:]
    return groups


def _evaluations(
    rows: Sequence[Row],
    title: str,
    candidates: Sequence[Measured],
) -> Figure | None:
    """Draw one panel a figure: error bars by round over the pretrained model's level.

    Args:
        candidates: figures to draw; those that no evaluation has are left out.
    """
    evals = [row for row in rows if row["stage"] == "eval"]
    shown = [figure for figure in candidates if series(evals, figure.metric)]
    if not shown:
        return None
    # Evaluation point → its rows, oldest first.
    by_point: dict[str | None, list[Row]] = {}
    for row in evals:
        by_point.setdefault(row.get("point"), []).append(row)
    picture, all_axes = canvas(len(shown), title)
    for axes, figure in zip(all_axes, shown, strict=True):
        if "pretrained" in by_point:
            _draw_level(axes, by_point["pretrained"][-1], figure.metric)
        for point, (label, color, marker, shift) in POINTS.items():
            found = by_point.get(point, [])
            draw_points(
                axes,
                found,
                figure.metric,
                shift,
                label=label,
                color=color,
                marker=marker,
            )
        round_axis(axes, [row["round"] for row in evals if row.get("point") in POINTS])
        axes.set_ylabel(figure.label)
        if figure.scale is not None:
            _keep_on_scale(axes, figure.scale)
        legend_below(axes)
    return picture


def _keep_on_scale(axes: Axes, scale: tuple[float, float]) -> None:
    """Let the vertical axis end near the scale's ends, and span a fifth of it at least."""
    least, greatest = scale
    margin = 0.02 * (greatest - least)
    lower, upper = axes.get_ylim()
    low = min(lower, greatest - 10 * margin)
    high = min(max(upper, lower + 10 * margin), greatest + margin)
    axes.set_ylim(max(low, least - margin), high)
    # Ticks neither in the margins nor outside the axis.
    first, last = max(least, low), min(greatest, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if first <= tick <= last])


def _draw_level(axes: Axes, row: Row, name: str) -> None:
    """Draw the pretrained model's value as a dashed line in the band of its 95 % interval."""
    level, low, high = _with_ends(row, name)
    if level is None:
        return
    axes.axhline(level, color=GREY, linestyle="--", linewidth=1.2, label="pretrained", zorder=1)
    if low is not None and high is not None:
        axes.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0)


def draw_points(axes: Axes, rows: Sequence[Row], name: str, shift: float, **style: Any) -> None:
    """Draw a line through the rows' values, with error bars where rows have an interval.

    Args:
        shift: along the round axis, in rounds.
        style: options of :meth:`matplotlib.axes.Axes.errorbar`.
    """
    places, values = [], []
    below, above = [], []  # lengths of the error bars; 0 without an interval
    for row in rows:
        value, low, high = _with_ends(row, name)
        if value is None:
            continue
        places.append(row["round"] + shift)
        values.append(value)
        below.append(0.0 if low is None else max(value - low, 0.0))
        above.append(0.0 if high is None else max(high - value, 0.0))
    if places:
        axes.errorbar(places, values, yerr=(below, above), markersize=5, capsize=3, **style)


def _with_ends(row: Row, name: str) -> tuple[float | None, float | None, float | None]:
    """Return a figure's value and the ends of its interval; None for what the row does not have."""
    return measured(row, name), measured(row, f"{name}_low"), measured(row, f"{name}_high")


def series(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """Return (round from 1, value) of every row that has the figure."""
    found = []
    for row in rows:
        value = measured(row, name)
        if value is not None:
            found.append((row["round"], value))
    return found


def canvas(num_panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """Make panels side by side on a figure outside pyplot, so that nothing has to be closed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Inches: padding around the whole and between panels, then the size of the figure.
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(5.0 * num_panels + 2.0, 4.2), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _widen(axes: Axes, span: float) -> None:
    """Let the vertical axis span at least ``span``, about the same middle."""
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        axes.ticklabel_format(axis="y", useOffset=False)


def legend_below(axes: Axes, num_columns: int = 3) -> None:
    """Put the legend under the axes, where it covers no error bar."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=num_columns, frameon=False)


def round_axis(axes: Axes, places: Sequence[int]) -> None:
    """Label the horizontal axis with whole rounds, with room around the first and the last."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    ticks = MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(ticks)
    if places:
        axes.set_xlim(min(places) - 0.6, max(places) + 0.6)
