"""Pictures that compare runs: benchmarks by round, loss by client, idle share, and cost against safety."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.record.plots import PHASE_COLORS, canvas, draw_points, legend_below, round_axis
from fedsim.record.tables import measured
from fedsim.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENT_LOSS = re.compile(r"client/loss_(\d{3,})")
MARKERS = "os^vDPX*"


def png(figure: Figure) -> bytes:
    """The picture in a palette of 64 colours, a third of the size."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=120)
    Image.open(raw).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def overlay(runs: Sequence[Run], name: str, label: str) -> Figure | None:
    """A benchmark by round, one colour a run; what CAI started from is dashed."""
    if not any(measured(row, name) is not None for run in runs for row in run.rows):
        return None
    figure, (axes,) = canvas(1, label)
    places = []
    for i, run in enumerate(runs):
        style = {"color": PHASE_COLORS[i % 8], "marker": MARKERS[i % 8]}
        for point, line, ending in (
            ("before_cai", "--", ", before CAI"), ("after_cai", "-", ""), ("global", "-", "")):  # fmt: skip
            rows = [row for row in run.rows if row["stage"] == "eval" and row.get("point") == point]
            places += [row["round"] + 1 for row in rows]
            draw_points(
                axes,
                rows,
                name,
                0.05 * (i - len(runs) / 2),
                label=run.facts.name + ending,
                linestyle=line,
                markerfacecolor="white" if point == "before_cai" else None,
                **style,
            )
    round_axis(axes, places)
    axes.set_ylabel(label)
    legend_below(axes, 2)
    return figure


def client_losses(run: Run) -> Figure | None:
    """Every client's mean loss in the rounds it trained in, over their mean."""
    found = [
        (row["round"] + 1, float(value))
        for row in run.rows
        for name, value in row.items()
        if CLIENT_LOSS.fullmatch(name)
    ]
    if not found:
        return None
    figure, (axes,) = canvas(1, f"{run.facts.name}: loss by client")
    axes.plot(*zip(*found, strict=True), "o", color=PHASE_COLORS[4], markersize=5, label="a client")
    means = [(row["round"] + 1, m) for row in run.rows if (m := measured(row, "client/loss")) is not None]
    axes.plot(*zip(*means, strict=True), color=PHASE_COLORS[0], label="mean, by rows")
    round_axis(axes, [place for place, _ in found])
    axes.set_ylabel("loss, nats per token")
    legend_below(axes, 2)
    return figure


def idle(runs: Sequence[Run]) -> Figure | None:
    """Share of the ranks' time without work while clients train."""
    name = "parallel/idle_share"
    series = [[(r["round"] + 1, 100 * v) for r in run.rows if (v := measured(r, name)) is not None] for run in runs]
    if not any(series):
        return None
    figure, (axes,) = canvas(1, "Idle share by round")
    for i, (run, points) in enumerate(zip(runs, series, strict=True)):
        if points:
            axes.plot(
                *zip(*points, strict=True), color=PHASE_COLORS[i % 8], marker=MARKERS[i % 8], label=run.facts.name
            )
    round_axis(axes, [place for points in series for place, _ in points])
    axes.set_ylabel("idle, %")
    legend_below(axes, 2)
    return figure


def cost(runs: Sequence[Run], name: str, label: str) -> Figure | None:
    """Seconds of each run against a benchmark at its end."""
    if not any(measured(run.final, name) is not None for run in runs):
        return None
    figure, (axes,) = canvas(1, f"Cost against {label}")
    for i, run in enumerate(runs):
        value, low, high = (measured(run.final, name + end) for end in ("", "_low", "_high"))
        if value is not None:
            spread = ([value - (value if low is None else low)], [(value if high is None else high) - value])
            axes.errorbar([run.facts.total_s], [value], yerr=spread, capsize=3, linestyle="none",
                          color=PHASE_COLORS[i % 8], marker=MARKERS[i % 8], label=run.facts.name)  # fmt: skip
    axes.set_xlabel("seconds of the run")
    axes.set_ylabel(label)
    legend_below(axes, 2)
    return figure
