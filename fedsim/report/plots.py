"""Pictures of a run, drawn from its metric rows: losses, safety, helpfulness and time by phase.

A picture whose figures no row holds is not drawn. Rounds are numbered from 1, as in the summary.
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

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PHASE_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

#: Evaluation point → label, colour, marker, shift along the round axis so that error bars do not cover each other.
POINTS = {
    "before_cai": ("before CAI", ORANGE, "v", -0.07),
    "after_cai": ("after CAI", BLUE, "o", 0.07),
    "global": ("no CAI in the round", GREEN, "s", 0.0),
}


#: Least height of a loss axis, in nats, so that noise is not drawn as a trend.
MIN_LOSS_SPAN = 0.05


def write_plots(rows: Sequence[Row], directory: Path, title: str, benchmarks: Benchmarks) -> list[Path]:
    """Draw every picture that the rows have figures for.

    Args:
        rows: the run's metric rows, oldest first.
        directory: where the PNG files go: ``loss.png``, ``safety.png``, ``helpfulness.png``, ``time.png``.
        title: the run in a few words; each picture's title begins with it.
        benchmarks: of the run.

    Returns:
        The files written, in that order.
    """
    directory.mkdir(parents=True, exist_ok=True)
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
    """Training losses by round: next-token losses on the left, DPO's, which has another scale, on the right."""
    token = {"client/loss": ("clients (SFT on own rows)", BLUE, "o"), "cai/sft_loss": ("CAI, SFT", GREEN, "s")}
    panels = [(token, "loss, nats per token"), ({"cai/dpo_loss": ("CAI, DPO", ORANGE, "^")}, "loss, nats per pair")]
    panels = [(lines, unit) for lines, unit in panels if any(_series(rows, name) for name in lines)]
    if not panels:
        return None
    figure, all_axes = canvas(len(panels), f"{title}: training loss by round")
    for axes, (lines, unit) in zip(all_axes, panels, strict=True):
        for name, (label, color, marker) in lines.items():
            series = _series(rows, name)
            if series:
                axes.plot(*zip(*series, strict=True), color=color, marker=marker, markersize=4, label=label)
        round_axis(axes, [row["round"] for row in rows if any(name in row for name in lines)])
        _widen(axes, MIN_LOSS_SPAN)
        axes.set_ylabel(unit)
        legend_below(axes)
    return figure


def plot_safety(rows: Sequence[Row], title: str, benchmarks: Benchmarks) -> Figure | None:
    """Headline shares and their controls, before and after CAI, with 95 % intervals and the pretrained level."""
    shown = [figure for figure in benchmarks.plotted if figure.is_share]
    return _evaluations(rows, f"{title}: safety, with 95 % intervals", shown)


def plot_helpfulness(rows: Sequence[Row], title: str, benchmarks: Benchmarks) -> Figure | None:
    """Headline figures in other units, such as MT-Bench from 1 to 10, likewise."""
    shown = [figure for figure in benchmarks.plotted if not figure.is_share]
    return _evaluations(rows, f"{title}: helpfulness, with 95 % interval", shown)


def plot_times(rows: Sequence[Row], title: str) -> Figure | None:
    """Seconds of each round, stacked by phase; the preparation of all sessions stands at 0."""
    rounds = _phase_seconds(rows)
    if not rounds:
        return None
    figure, (axes,) = canvas(1, f"{title}: time by phase")
    floor = dict.fromkeys(rounds, 0.0)
    for color, (label, group) in zip(PHASE_COLORS, _phase_groups(rounds).items(), strict=False):
        heights = [sum(phases.get(phase, 0.0) for phase in group) for phases in rounds.values()]
        label = f"{label}, {duration(sum(heights))}"
        axes.bar(list(rounds), heights, 0.8, bottom=list(floor.values()), color=color, label=label)
        floor = {place: floor[place] + height for place, height in zip(rounds, heights, strict=True)}
    round_axis(axes, list(rounds))
    if 0 in rounds:
        axes.set_xlabel("round (0 = preparation)")
    axes.set_ylabel("seconds")
    axes.set_ylim(0.0, 1.05 * max(floor.values()) or 1.0)
    handles, labels = axes.get_legend_handles_labels()  # in the order of the stack, top first
    axes.legend(handles[::-1], labels[::-1], title="phase, total", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _phase_seconds(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Round from 1 (0 = preparation, also of resumed sessions) → seconds by phase; rounds without any are left out."""
    rounds: dict[int, dict[str, float]] = {}
    for row in rows:
        for phase, seconds in top_level_seconds(row).items():
            into = rounds.setdefault(0 if row["stage"] == RESUME else row["round"], {})
            into[phase] = into.get(phase, 0.0) + seconds
    return dict(sorted(rounds.items()))


def _phase_groups(rounds: Mapping[int, Mapping[str, float]]) -> dict[str, list[str]]:
    """Label → phases, longest first; as many as there are colours, the smallest ones together as "other"."""
    totals: dict[str, float] = {}
    for phases in rounds.values():
        for phase, seconds in phases.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    ordered = sorted(totals, key=lambda phase: -totals[phase])
    num_shown = len(ordered) if len(ordered) <= len(PHASE_COLORS) else len(PHASE_COLORS) - 1
    groups = {phase.replace("_", " "): [phase] for phase in ordered[:num_shown]}
    return groups if num_shown == len(ordered) else {**groups, "other": ordered[num_shown:]}


def _evaluations(rows: Sequence[Row], title: str, shown: Sequence[Measured]) -> Figure | None:
    """One panel a figure: points with error bars by round over the pretrained model's level."""
    evals = [row for row in rows if row["stage"] == "eval"]
    shown = [figure for figure in shown if any(measured(row, figure.metric) is not None for row in evals)]
    if not shown:
        return None
    picture, all_axes = canvas(len(shown), title)
    for axes, figure in zip(all_axes, shown, strict=True):
        for row in [row for row in evals if row.get("point") == "pretrained"][-1:]:
            _draw_level(axes, row, figure.metric)
        for point, (series_label, color, marker, shift) in POINTS.items():
            found = [row for row in evals if row.get("point") == point]
            draw_points(axes, found, figure.metric, shift, label=series_label, color=color, marker=marker)
        round_axis(axes, [row["round"] for row in evals if row.get("point") in POINTS])
        axes.set_ylabel(figure.label)
        if figure.scale is not None:
            _keep_on_scale(axes, figure.scale)
        legend_below(axes)
    return picture


def _keep_on_scale(axes: Axes, scale: tuple[float, float]) -> None:
    """Let the vertical axis end near the scale's ends, and span a fifth of it at least."""
    low, high = axes.get_ylim()
    margin = 0.02 * (scale[1] - scale[0])
    low, high = min(low, scale[1] - 10 * margin), min(max(high, low + 10 * margin), scale[1] + margin)
    axes.set_ylim(max(low, scale[0] - margin), high)
    axes.set_yticks([tick for tick in axes.get_yticks() if scale[0] <= tick <= scale[1] and low <= tick <= high])


def _draw_level(axes: Axes, row: Row, name: str) -> None:
    level, low, high = (measured(row, name + ending) for ending in ("", "_low", "_high"))
    if level is None:
        return
    axes.axhline(level, color=GREY, linestyle="--", linewidth=1.2, label="pretrained", zorder=1)
    if low is not None and high is not None:
        axes.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0)


def draw_points(axes: Axes, rows: Sequence[Row], name: str, shift: float, **style: Any) -> None:
    """A line through the rows' values; error bars reach to the interval's ends where a row has them."""
    places, values, below, above = [], [], [], []
    for row in rows:
        value, low, high = (measured(row, name + ending) for ending in ("", "_low", "_high"))
        if value is not None:
            places.append(row["round"] + shift)
            values.append(value)
            below.append(0.0 if low is None else max(value - low, 0.0))
            above.append(0.0 if high is None else max(high - value, 0.0))
    if places:
        axes.errorbar(places, values, yerr=(below, above), markersize=5, capsize=3, **style)


def _series(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(round from 1, value) of every row that has the figure."""
    return [(row["round"], value) for row in rows if (value := measured(row, name)) is not None]


def canvas(num_panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """Panels side by side on a figure that no global state knows, so that nothing has to be closed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)  # inches around the whole and between panels
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
    """Under the axes, where it covers no error bar."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=num_columns, frameon=False)


def round_axis(axes: Axes, places: Sequence[int]) -> None:
    """Whole rounds only, with room around the first and the last."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if places:
        axes.set_xlim(min(places) - 0.6, max(places) + 0.6)
