"""Pictures that compare runs: benchmarks by round, loss by client, idle share, and cost against safety."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.base.figures import Figure
from fedsim.base.tables import measured
from fedsim.report.arms import arm_figure, by_base, grouped, pretrained_figure
from fedsim.report.plots import GREY, canvas, draw_points, legend_below, round_axis
from fedsim.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's palette, its faint colours darkened so that a line shows on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4488", "#8C5A00", "#117799", "#332288", "#882255")
CLIENT_LOSS = re.compile(r"client/loss_(\d{3,})")
MARKERS = "os^vDhX*"


def png(picture: Picture) -> bytes:
    """The picture in a palette of 64 colours, a third of the size."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    picture.savefig(raw, dpi=120)
    Image.open(raw).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def overlay(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """A benchmark by round, one colour a run; what CAI started from is dashed. None where one round alone has it."""
    rounds = {
        row["round"]
        for run in runs
        for row in run.rows
        if measured(row, figure.metric) is not None and row["round"] > 0
    }
    if len(rounds) < 2:
        return None
    picture, (axes,) = canvas(1, figure.label)
    places = []
    _level(axes, runs, figure)
    for i, run in enumerate(runs):
        style = {"color": COLORS[i % 8], "marker": MARKERS[i % 8]}
        for point, line, ending in (
            ("before_cai", "--", ", before CAI"), ("after_cai", "-", ""), ("global", "-", "")):  # fmt: skip
            rows = [row for row in run.rows if row["stage"] == "eval" and row.get("point") == point]
            places += [row["round"] for row in rows]
            draw_points(
                axes,
                rows,
                figure.metric,
                0.05 * (i - len(runs) / 2),
                label=run.title + ending,
                linestyle=line,
                markerfacecolor="white" if point == "before_cai" else None,
                **style,
            )
    round_axis(axes, places)
    axes.set_ylabel(figure.label)
    legend_below(axes, 2)
    return picture


def dots(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """A benchmark at the end of training, one line a group, with 95 % intervals; None where it was not measured."""
    found = {group.name: group.runs for group in grouped(runs) if arm_figure(group.runs, figure)}
    if not found:
        return None
    picture, (axes,) = canvas(1, figure.label)
    for i, members in enumerate(found.values()):
        for point, color, marker in (("before_cai", COLORS[1], "v"), ("final", COLORS[0], "o")):
            value = arm_figure(members, figure, point)
            if value is not None:
                known = {"before_cai": "before CAI", "final": "at the end"}[point]
                shown = known not in axes.get_legend_handles_labels()[1]
                axes.errorbar(value.value, i, xerr=value.reach, color=color, marker=marker, capsize=3,
                              linestyle="none", label=known if shown else None)  # fmt: skip
    _level(axes, runs, figure, upright=True)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(figure.label)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    legend_below(axes, 3)
    return picture


def _level(axes: Axes, runs: Sequence[Run], figure: Figure, *, upright: bool = False) -> None:
    """The figure of each pretrained model as a dotted line."""
    draw = axes.axvline if upright else axes.axhline
    for base, style in zip(by_base(runs), itertools.cycle((":", "-.", "--"))):
        value = pretrained_figure(base.runs, figure)
        if value is not None:
            draw(value.value, color=GREY, linestyle=style, linewidth=1.4, label=base.name, zorder=1)


def client_losses(run: Run) -> Picture | None:
    """Every client's mean loss in the rounds it trained in, over their mean."""
    found = [
        (row["round"], float(value)) for row in run.rows for name, value in row.items() if CLIENT_LOSS.fullmatch(name)
    ]
    if not found:
        return None
    picture, (axes,) = canvas(1, f"{run.title}: loss by client")
    axes.plot(*zip(*found, strict=True), "o", color=COLORS[0], markersize=4, label="a client")
    means = [(row["round"], m) for row in run.rows if (m := measured(row, "client/loss")) is not None]
    axes.plot(*zip(*means, strict=True), color=COLORS[1], label="mean, by rows")
    round_axis(axes, [place for place, _ in found])
    axes.set_ylabel("loss, nats per token")
    legend_below(axes, 2)
    return picture


def idle(runs: Sequence[Run]) -> Picture | None:
    """Share of the ranks' time without work while clients train."""
    name = "parallel/idle_share"
    series = [[(r["round"], 100 * v) for r in run.rows if (v := measured(r, name)) is not None] for run in runs]
    if not any(series):
        return None
    picture, (axes,) = canvas(1, "Idle share by round")
    for i, (run, points) in enumerate(zip(runs, series, strict=True)):
        if points:
            axes.plot(*zip(*points, strict=True), color=COLORS[i % 8], marker=MARKERS[i % 8], label=run.title)
    round_axis(axes, [place for points in series for place, _ in points])
    axes.set_ylabel("idle, %")
    legend_below(axes, 2)
    return picture


def cost(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """Mean seconds of a group's runs against a benchmark at their end; None where it was not measured."""
    if not any(measured(run.final, figure.metric) is not None for run in runs):
        return None
    picture, (axes,) = canvas(1, f"Cost against {figure.label}")
    for i, group in enumerate(grouped(runs)):
        value = arm_figure(group.runs, figure)
        if value is not None:
            seconds = sum(run.facts.total_s for run in group.runs) / len(group.runs)
            axes.errorbar([seconds], [value.value], yerr=value.reach, capsize=3, linestyle="none", color=COLORS[i % 8],
                          marker=MARKERS[i % 8], label=group.name)  # fmt: skip
    axes.set_xlabel("seconds of a run")
    axes.set_ylabel(figure.label)
    legend_below(axes, 2)
    return picture
