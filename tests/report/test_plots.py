"""Pictures hold the rows' figures, are readable (titles, units, legends, no clipped text), and left out when empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedsim.evaluate.own import DESCRIBED
from fedsim.record.metrics import Row
from fedsim.report.plots import (
    MIN_LOSS_SPAN,
    plot_helpfulness,
    plot_losses,
    plot_safety,
    plot_times,
    write_plots,
)

MakeRun = Callable[..., list[Row]]
MakeEval = Callable[..., Row]
DRAWINGS: list[Callable[[list[Row], str], Figure | None]] = [
    plot_losses,
    lambda rows, title: plot_safety(rows, title, DESCRIBED),
    lambda rows, title: plot_helpfulness(rows, title, DESCRIBED),
    plot_times,
]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def line(figure: Figure, panel: int, label: str) -> tuple[list[float], list[float]]:
    """x and y of the line, or of the error bars' line, with this label."""
    axes = figure.axes[panel]
    handles, labels = axes.get_legend_handles_labels()
    found = handles[labels.index(label)]
    data = found[0] if hasattr(found, "has_yerr") else found
    return [float(x) for x in data.get_xdata()], [float(y) for y in data.get_ydata()]


def test_losses(make_run: MakeRun) -> None:
    rows = make_run(4)
    figure = drawn(plot_losses(rows, "run"))
    expected = [row["client/loss"] for row in rows if row["stage"] == "round"]
    assert line(figure, 0, "clients (SFT on own rows)") == ([1.0, 2.0, 3.0, 4.0], expected)
    assert line(figure, 1, "CAI, DPO")[1] == pytest.approx([0.69, 0.65, 0.61, 0.57])
    assert len(drawn(plot_losses(make_run(4, cai=False), "run")).axes) == 1


def test_a_loss_axis_does_not_magnify_noise(make_run: MakeRun) -> None:
    rows = make_run(8)
    for row in rows:
        if "cai/dpo_loss" in row:
            row["cai/dpo_loss"] = 0.6931 - 2e-5 * row["round"]
    token, pair = drawn(plot_losses(rows, "run")).axes
    low, high = pair.get_ylim()
    assert high - low == pytest.approx(MIN_LOSS_SPAN) and low < 0.6929 < 0.6931 < high
    assert np.ptp(token.get_ylim()) > 1.0  # from 0.85 to 3 nats: as the data have it


def test_safety_has_points_intervals_and_the_pretrained_level(make_run: MakeRun) -> None:
    rows = make_run(3)
    figure = drawn(plot_safety(rows, "run", DESCRIBED))
    values = [row["eval/advbench_harmless"] for row in rows if row.get("point") == "before_cai"]
    assert line(figure, 0, "before CAI")[1] == values
    assert line(figure, 0, "pretrained")[1] == [99.8, 99.8]
    (bars,) = [c for c in figure.axes[0].containers if c.get_label() == "before CAI"]
    ends = [np.asarray(segment)[:, 1].tolist() for segment in bars[2][0].get_segments()]
    assert ends == [pytest.approx([value - 3, value + 3]) for value in values]


def test_rounds_with_and_without_cai_are_told_apart(make_eval: MakeEval) -> None:
    """A run with CAI in every second round has both kinds of points in one panel."""
    rows = [make_eval(i, "after_cai" if i % 2 else "global", 90.0, 60.0, 8.0) for i in range(4)]
    figure = plot_helpfulness(rows, "run", DESCRIBED)
    assert figure is not None
    series = figure.axes[0].containers
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["after CAI", "no CAI in the round"]
    assert len({(lines[0].get_color(), lines[0].get_marker()) for lines in series}) == 2
    assert [len(lines[0].get_xdata()) for lines in series] == [2, 2]


def test_the_control_stands_beside_advbench(make_run: MakeRun) -> None:
    rows = make_run(3)
    for row in rows:
        if row["stage"] == "eval":
            row |= {"eval/xstest_safe_refused": 12.0 + row["round"], "eval/xstest_safe_refused_low": 0.0,
                    "eval/xstest_safe_refused_high": 40.0}  # fmt: skip
    figure = drawn(plot_safety(rows, "run", DESCRIBED))
    assert [axes.get_ylabel().partition(":")[0] for axes in figure.axes] == ["AdvBench", "XSTest", "HHH"]
    assert line(figure, 1, "before CAI")[1] == [13.0, 14.0, 15.0]
    low, high = figure.axes[1].get_ylim()
    assert low <= 0.0 and high >= 40.0


def test_points_stay_inside_the_picture(make_run: MakeRun) -> None:
    for figure in (plot_safety(make_run(5), "run", DESCRIBED), plot_helpfulness(make_run(5), "run", DESCRIBED)):
        for axes in drawn(figure).axes:
            low, high = axes.get_ylim()
            for container in axes.containers:
                ys = np.concatenate([np.asarray(s)[:, 1] for s in container[2][0].get_segments()])
                assert low <= ys.min() and ys.max() <= high


def test_times_are_stacked_without_nested_phases(make_run: MakeRun) -> None:
    rows = make_run(2)
    (axes,) = drawn(plot_times(rows, "run")).axes
    tops: dict[float, float] = {}
    for patch in axes.patches:
        place = patch.get_x() + patch.get_width() / 2
        tops[place] = max(tops.get(place, 0.0), patch.get_y() + patch.get_height())
    # before the first round: guard 21, CAI generation 12, pretrained evaluation 4; then training and two evaluations
    assert tops == pytest.approx({0.0: 37.0, 1.0: 8.0 + 0.5 + 6.0 + 8.0, 2.0: 8.1 + 0.5 + 6.0 + 8.0})


def test_many_phases_share_a_rest() -> None:
    row: Row = {"round": 0, "stage": "round", **{f"time/phase{i}_s": 20.0 - i for i in range(12)}}
    (axes,) = drawn(plot_times([row], "run")).axes
    _, labels = axes.get_legend_handles_labels()
    assert len(labels) == 8 and labels[-1].startswith("other")
    assert max(p.get_y() + p.get_height() for p in axes.patches) == pytest.approx(sum(20.0 - i for i in range(12)))


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("num_rounds", [1, 8, 50])
def test_titles_units_legends_and_no_clipped_text(
    make_run: MakeRun, draw: Callable[[list[Row], str], Figure | None], num_rounds: int
) -> None:
    figure = drawn(draw(make_run(num_rounds), "SCAFFOLD, FL + filter + CAI"))
    assert figure.get_suptitle().startswith("SCAFFOLD")
    for axes in figure.axes:
        assert axes.get_xlabel().startswith("round") and axes.get_ylabel()
        assert axes.get_legend() is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent(renderer)
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside or not _is_shown(text, figure), f"{text.get_text()!r} is clipped"


def _is_shown(text: Text, figure: Figure) -> bool:
    """Whether a text belongs to what is drawn (tick labels outside of the axis' limits are not)."""
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if text in (tick.label1, tick.label2):
                    return limits[0] <= tick.get_loc() <= limits[1]
    return True


def test_only_measured_pictures_are_written(tmp_path: Path, make_run: MakeRun, make_eval: MakeEval) -> None:
    assert [path.name for path in write_plots(make_run(2), tmp_path / "all", "run", DESCRIBED)] == [
        "loss.png",
        "safety.png",
        "helpfulness.png",
        "time.png",
    ]
    unjudged = [make_eval(0, "global", 90.0, 60.0, None)]
    del unjudged[0]["time/eval_s"]
    assert [path.name for path in write_plots(unjudged, tmp_path / "some", "run", DESCRIBED)] == ["safety.png"]
    assert write_plots([], tmp_path / "none", "run", DESCRIBED) == []
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
