"""A sweep as a picture: a panel a figure, a curve a value of the curves' key, 95 % intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report.plots import PHASE_COLORS, canvas
from fedsim.study.grid import Sweep, point_name
from fedsim.study.statistics import Effect
from fedsim.study.sweep import Record, estimates, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osv^DPX*"


def write_plot(sweep: Sweep, records: Sequence[Record], path: Path) -> None:
    """Draw the sweep into a PNG file."""
    # Estimates by figure and point; a panel for each figure that was measured.
    shown = {}
    for figure in sweep.figures:
        found = estimates(sweep, records, figure)
        if found:
            shown[figure] = found
    places_on_x = {str(record["point"]): _number(record["x"]) for record in records}
    figure_, panels = canvas(len(shown), sweep.what)
    for axes, (figure, found) in zip(panels, shown.items(), strict=True):
        # Curve → (x, mean, error bar down, error bar up) of its points.
        curves: dict[str, list[tuple[Any, float, float, float]]] = {}
        for point in sweep.points:
            name = point_name(point)
            if name in found:
                place = (places_on_x[name], found[name].mean, *_reach(found[name]))
                curves.setdefault(_curve(sweep, point), []).append(place)
        all_places = itertools.chain.from_iterable(curves.values())
        ticks = sorted({x for x, *_ in all_places})

        # Texts lie at the places of their ticks.
        for i, (label, places) in enumerate(curves.items()):
            xs, ys, below, above = zip(*sorted(places), strict=True)
            drawn = [ticks.index(x) if isinstance(x, str) else x for x in xs]
            axes.errorbar(
                drawn,
                ys,
                yerr=(below, above),
                color=PHASE_COLORS[i % len(PHASE_COLORS)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                capsize=3,
                label=label,
            )
        _label_x(axes, sweep.x, ticks)
        axes.set_ylabel(title(figure))
    if sweep.curves:  # the panels have the same curves
        handles, names = panels[0].get_legend_handles_labels()
        figure_.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    figure_.savefig(path, dpi=150)


def _number(value: Any) -> float | str:
    """A record's place on the axis; a text that is no number stays one."""
    try:
        return float(value)
    except ValueError:
        return str(value)


def _reach(effect: Effect) -> tuple[float, float]:
    """Lengths of the error bar down and up; 0 where all seeds have one value."""
    if math.isinf(effect.low):
        return 0.0, 0.0
    return max(effect.mean - effect.low, 0.0), max(effect.high - effect.mean, 0.0)


def _curve(sweep: Sweep, point: Mapping[str, Any]) -> str:
    """Name of the curve that a point belongs to."""
    if not sweep.curves:
        return ""
    value = point[sweep.curves]
    text = f"{value:g}" if isinstance(value, float) else value
    return f"{sweep.curves.rpartition('.')[2]} = {text}"


def _scale(values: Sequence[Any]) -> str:
    """Kind of an axis: ``text``, ``linear`` or ``log``.

    Texts lie at equal distances; numbers over more than a factor of 20 on a logarithmic axis (0 at
    its left end).
    """
    if any(isinstance(value, str) for value in values):
        return "text"
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    if positive and max(positive) / min(positive) > 20:
        return "log"
    return "linear"


def _far_enough(places: Sequence[float], least: float = 0.045) -> list[bool]:
    """Flags of the labels to show: each keeps its distance from the one shown before.

    Args:
        least: the distance, as a share of the axis.
    """
    shown: list[bool] = []
    last = -math.inf
    for place in places:
        shown.append(place - last >= least)
        if shown[-1]:
            last = place
    return shown


def _label_x(axes: Axes, x: str, ticks: Sequence[Any]) -> None:
    """Name the axis, and mark only the values that were run."""
    kind = _scale(ticks)
    if kind == "log":
        axes.set_xscale("symlog", linthresh=min(v for v in ticks if v > 0))
    if kind != "linear":
        numbers = range(len(ticks)) if kind == "text" else ticks
        places = [float(number) for number in numbers]
        axes.set_xticks(places)

        # Places as shares of the axis [num_ticks]; labels that are too close stay empty.
        pixels = axes.transData.transform([(place, 0.0) for place in places])
        on_axis = axes.transAxes.inverted().transform(pixels)[:, 0]
        room = _far_enough([float(place) for place in on_axis])
        labels = []
        for value, has_room in zip(ticks, room, strict=True):
            label = value if isinstance(value, str) else f"{value:g}"
            labels.append(label if has_room else "")
        axes.set_xticklabels(labels)
        axes.minorticks_off()
    axes.set_xlabel(x)
