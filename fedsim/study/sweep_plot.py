"""A sweep as a picture: one panel a figure, one curve a value of the curves' key, 95 % intervals."""

from __future__ import annotations

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
    shown = {figure: found for figure in sweep.figures if (found := estimates(sweep, records, figure))}
    places_on_x = {str(record["point"]): _number(record["x"]) for record in records}
    figure_, panels = canvas(len(shown), sweep.what)
    for axes, (figure, found) in zip(panels, shown.items(), strict=True):
        curves: dict[str, list[tuple[Any, float, float, float]]] = {}
        for point in sweep.points:
            name = point_name(point)
            if name in found:
                place = (places_on_x[name], found[name].mean, *_reach(found[name]))
                curves.setdefault(_curve(sweep, point), []).append(place)
        ticks = sorted({x for places in curves.values() for x, *_ in places})
        for i, (label, places) in enumerate(curves.items()):
            xs, ys, below, above = zip(*sorted(places), strict=True)
            axes.errorbar(
                [ticks.index(x) if isinstance(x, str) else x for x in xs],
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
    """Lengths of the error bar down and up; 0 where all seeds have one value, which allows no interval."""
    if math.isinf(effect.low):
        return 0.0, 0.0
    return max(effect.mean - effect.low, 0.0), max(effect.high - effect.mean, 0.0)


def _curve(sweep: Sweep, point: Mapping[str, Any]) -> str:
    """Name of the curve that a point belongs to."""
    if not sweep.curves:
        return ""
    value = point[sweep.curves]
    return f"{sweep.curves.rpartition('.')[2]} = {f'{value:g}' if isinstance(value, float) else value}"


def _scale(values: Sequence[Any]) -> str:
    """Texts lie at equal distances; numbers over more than a factor of 20 on a logarithmic axis (0 at its left end)."""
    if any(isinstance(value, str) for value in values):
        return "text"
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    return "log" if positive and max(positive) / min(positive) > 20 else "linear"


def _far_enough(places: Sequence[float], least: float = 0.045) -> list[bool]:
    """Which labels can be read: those that keep ``least`` (a share of the axis) from the one before that is shown."""
    shown: list[bool] = []
    last = -math.inf
    for place in places:
        shown.append(place - last >= least)
        last = place if shown[-1] else last
    return shown


def _label_x(axes: Axes, x: str, ticks: Sequence[Any]) -> None:
    """Name the axis, and mark just the values that were run."""
    kind = _scale(ticks)
    if kind == "log":
        axes.set_xscale("symlog", linthresh=min(v for v in ticks if v > 0))
    if kind != "linear":
        places = [float(i) if kind == "text" else float(v) for i, v in enumerate(ticks)]
        axes.set_xticks(places)
        room = _far_enough([float(place) for place in axes.transAxes.inverted().transform(
            axes.transData.transform([(place, 0.0) for place in places]))[:, 0]])  # fmt: skip
        labels = [v if isinstance(v, str) else f"{v:g}" for v in ticks]
        axes.set_xticklabels([label if free else "" for label, free in zip(labels, room, strict=True)])
        axes.minorticks_off()
    axes.set_xlabel(x)
