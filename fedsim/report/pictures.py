"""Pictures that compare runs: benchmarks by round, loss by client, idle share, cost."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.base.figures import Figure
from fedsim.base.tables import measured
from fedsim.report.arms import arm_figure, by_base, grouped, pretrained_figure
from fedsim.report.plots import GREY, canvas, draw_points, legend_below, round_axis, series
from fedsim.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's palette, its faint colours darkened so that a line shows on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4488", "#8C5A00", "#117799", "#332288", "#882255")
CLIENT_LOSS = re.compile(r"client/loss_(\d{3,})")
"""Name of the metric that holds a client's mean loss."""

MARKERS = "os^vDhX*"

#: Evaluation point → style of its line, ending of its label, colour in its markers (None: the
#: line's).
LINES = {
    "before_cai": ("--", ", before CAI", "white"),
    "after_cai": ("-", "", None),
    "global": ("-", "", None),
}

#: Point of :func:`dots` → label, colour, marker.
DOTS = {"before_cai": ("before CAI", COLORS[1], "v"), "final": ("at the end", COLORS[0], "o")}


def png(picture: Picture) -> bytes:
    """Encode a picture as PNG in a palette of 64 colours, a third of the size."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    picture.savefig(raw, dpi=120)
    Image.open(raw).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def overlay(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """Draw a benchmark by round, one colour a run; the model before CAI is dashed.

    Returns:
        None where fewer than two rounds have the figure.
    """
    # Rounds that were evaluated; the pretrained model's is 0.
    rounds: set[int] = set()
    for run in runs:
        rounds.update(place for place, _ in series(run.rows, figure.metric) if place > 0)
    if len(rounds) < 2:
        return None
    picture, (axes,) = canvas(1, figure.label)
    _level(axes, runs, figure)
    places = []
    for i, run in enumerate(runs):
        style = {"color": COLORS[i % 8], "marker": MARKERS[i % 8]}
        shift = 0.05 * (i - len(runs) / 2)  # rounds, so that error bars do not cover each other
        for point, (line, ending, inside) in LINES.items():
            rows = [row for row in run.rows if row["stage"] == "eval" and row.get("point") == point]
            places += [row["round"] for row in rows]
            draw_points(
                axes,
                rows,
                figure.metric,
                shift,
                label=run.title + ending,
                linestyle=line,
                markerfacecolor=inside,
                **style,
            )
    round_axis(axes, places)
    axes.set_ylabel(figure.label)
    legend_below(axes, 2)
    return picture


def dots(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """Draw a benchmark at the end of training, one line a group, with 95 % intervals.

    Returns:
        None where it was not measured.
    """
    found = {group.name: group.runs for group in grouped(runs) if arm_figure(group.runs, figure)}
    if not found:
        return None
    picture, (axes,) = canvas(1, figure.label)
    for i, members in enumerate(found.values()):
        for point, (label, color, marker) in DOTS.items():
            value = arm_figure(members, figure, point)
            if value is None:
                continue
            _, labels = axes.get_legend_handles_labels()
            axes.errorbar(
                value.value,
                i,
                xerr=value.reach,
                color=color,
                marker=marker,
                capsize=3,
                linestyle="none",
                label=None if label in labels else label,  # once in the legend
            )
    _level(axes, runs, figure, upright=True)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)  # the first group on top
    axes.set_xlabel(figure.label)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    legend_below(axes, 3)
    return picture


def _level(axes: Axes, runs: Sequence[Run], figure: Figure, *, upright: bool = False) -> None:
    """Draw the figure of each pretrained model as a dotted line."""
    draw = axes.axvline if upright else axes.axhline
    for base, style in zip(by_base(runs), itertools.cycle((":", "-.", "--"))):
        value = pretrained_figure(base.runs, figure)
        if value is not None:
            draw(
                value.value,
                color=GREY,
                linestyle=style,
                linewidth=1.4,
                label=base.name,
                zorder=1,  # below the runs
            )


def client_losses(run: Run) -> Picture | None:
    """Draw every client's mean loss in the rounds it trained in, over the mean of all.

    Returns:
        None where no client's loss was recorded.
    """
    # A dot for each client and round.
    places, losses = [], []
    for row in run.rows:
        for name, value in row.items():
            if CLIENT_LOSS.fullmatch(name):
                places.append(row["round"])
                losses.append(float(value))
    if not places:
        return None
    picture, (axes,) = canvas(1, f"{run.title}: loss by client")
    axes.plot(places, losses, "o", color=COLORS[0], markersize=4, label="a client")
    # A line of the mean over a round's rows.
    means = series(run.rows, "client/loss")
    axes.plot(*zip(*means, strict=True), color=COLORS[1], label="mean, by rows")
    round_axis(axes, places)
    axes.set_ylabel("loss, nats per token")
    legend_below(axes, 2)
    return picture


def idle(runs: Sequence[Run]) -> Picture | None:
    """Draw the share of the ranks' time without work while clients train.

    Returns:
        None where no run has it.
    """
    # (round, share from 0 to 1) of each run.
    by_run = [series(run.rows, "parallel/idle_share") for run in runs]
    if not any(by_run):
        return None
    picture, (axes,) = canvas(1, "Idle share by round")
    places = []
    for i, (run, points) in enumerate(zip(runs, by_run, strict=True)):
        if not points:
            continue
        rounds = [place for place, _ in points]
        percent = [100 * share for _, share in points]
        axes.plot(rounds, percent, color=COLORS[i % 8], marker=MARKERS[i % 8], label=run.title)
        places += rounds
    round_axis(axes, places)
    axes.set_ylabel("idle, %")
    legend_below(axes, 2)
    return picture


def cost(runs: Sequence[Run], figure: Figure) -> Picture | None:
    """Draw the mean seconds of a group's runs against a benchmark at their end.

    Returns:
        None where it was not measured.
    """
    if not any(measured(run.final, figure.metric) is not None for run in runs):
        return None
    picture, (axes,) = canvas(1, f"Cost against {figure.label}")
    for i, group in enumerate(grouped(runs)):
        value = arm_figure(group.runs, figure)
        if value is not None:
            # Mean over the group's runs.
            seconds = sum(run.total_s for run in group.runs) / len(group.runs)
            axes.errorbar(
                [seconds],
                [value.value],
                yerr=value.reach,
                capsize=3,
                linestyle="none",
                color=COLORS[i % 8],
                marker=MARKERS[i % 8],
                label=group.name,
            )
    axes.set_xlabel("seconds of a run")
    axes.set_ylabel(figure.label)
    legend_below(axes, 2)
    return picture
