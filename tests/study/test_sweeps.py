"""Sweeps: their files, the cells that follow, and sentences that follow from intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from fedsim.base.errors import ConfigError, DataError
from fedsim.config import load_config
from fedsim.report.finished import FinishedRun
from fedsim.study.command import made_by, parse_seeds, write_csv
from fedsim.study.grid import FORMS, Comparison, point_name, read_sweep
from fedsim.study.runs import Launch, words_of
from fedsim.study.sweep import Record, finding, read_records, tidy_rows
from fedsim.study.sweep_plot import _far_enough, _scale, write_plot

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_cell_of_a_shipped_sweep_is_a_configuration(path: Path, form: str) -> None:
    sweep = read_sweep(path, form)
    assert len(sweep.findings) >= 2 and (form == "full" or len(sweep.points) <= 12)
    launch = Launch("s", sweep.config, words_of(sweep.settings), 1, 1, Path("x"))
    cells = sweep.cells([0, 1])
    assert len({cell.name for cell in cells}) == len(cells) == 2 * len(sweep.points)
    for cell in cells:
        config = launch.resolved(cell)
        assert config.seed == cell.seed
    keys = {key for point in sweep.points for key in point}
    assert sweep.x in keys and sweep.curves in {"", *keys}


SWEEP = """
what: a question
config: base.yaml
x: cai.iterations
curves: cai.every
figures: [advbench_harmless, mt_bench]
quick:
  seeds: 0-1
  settings: {eval.xstest: ""}
  grids:
    - {cai.every: [1, 2], cai.iterations: [0, 5]}
    - {cai.every: 1, cai.iterations: [5, 50]}
  findings:
    - figure: mt_bench
      treated: {cai.every: 1, cai.iterations: 50}
      control: {cai.every: 2, cai.iterations: 5}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("seed: 3\n", encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def test_grids_are_products_and_every_point_comes_once(written: Path) -> None:
    sweep = read_sweep(written, "quick")
    assert [point_name(p) for p in sweep.points] == [
        *(f"every-{e}-iterations-{i}" for e in (1, 2) for i in (0, 5)),
        "every-1-iterations-50",
    ]
    assert (sweep.name, sweep.config, parse_seeds(sweep.seeds)) == ("mine", written.parent / "base.yaml", [0, 1])
    cell = sweep.cells([4])[-1]
    assert cell.settings == {"cai.every": 1, "cai.iterations": 50} and cell.seed == 4
    assert sweep.settings == {"eval.xstest": ""}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("quick:", "slow:", "a part 'quick'"),
        ("x: cai.iterations", "y: cai.iterations", "lacks 'x'"),
        ("iterations: 50}", "iterations: 51}", "a finding names .*51.* which no grid has"),
        ("[advbench_harmless, mt_bench]", "3", "another shape"),
        (
            "- {cai.every: [1, 2], cai.iterations: [0, 5]}",
            "- {cai.every: 1, eval.every: 1}\n    - {every: 1}",
            "finding",
        ),
        ("what: a question", "what: [a", "cannot be read"),
        ('settings: {eval.xstest: ""}', "settings: abc", "another shape"),
        ("treated: {cai.every: 1, cai.iterations: 50}", "treated: abc", "another shape"),
        ("- {cai.every: 1, cai.iterations: [5, 50]}", "- {}", "needs keys"),
        ("- {cai.every: 1, cai.iterations: [5, 50]}", "- {cai.every: []}", "needs keys"),
        ("- {cai.every: 1, cai.iterations: [5, 50]}", "- {3: 4}", "needs keys"),
        ("- {cai.every: 1, cai.iterations: [5, 50]}", "- {eval.every: 1, cai.iterations: 5}", "share the name"),
    ],
)
def test_a_mistake_in_a_sweeps_file_is_one_line(written: Path, old: str, new: str, message: str) -> None:
    written.write_text(SWEEP.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as told:
        read_sweep(written, "quick")
    assert "\n" not in str(told.value) and "mine.yaml" in str(told.value)


@pytest.fixture
def runs(written: Path, finish: Callable[..., FinishedRun]) -> dict[str, list[FinishedRun]]:
    """MT-Bench rises with the iterations; AdvBench does not move."""
    found: dict[str, list[FinishedRun]] = {}
    for point in read_sweep(written, "quick").points:
        words = [f"{key}={value}" for key, value in point.items()]
        items = {"mt_bench": [2.0 + point["cai.iterations"] / 10] * 5, "advbench_harmless_openfedllm": [1.0, 0.0, 1.0]}
        for seed in (0, 1):
            moved = {**items, "mt_bench": [value + (seed + point["cai.every"]) / 100 for value in items["mt_bench"]]}
            run = finish(f"{point_name(point)}-s{seed}", [*words, f"seed={seed}"], {"after_cai": moved})
            found.setdefault(point_name(point), []).append(run)
    return found


@pytest.fixture
def records(written: Path, runs: dict[str, list[FinishedRun]], tmp_path: Path) -> list[Record]:
    """The runs' records by way of their file."""
    write_csv(tmp_path / "sweep.csv", tidy_rows(read_sweep(written, "quick"), runs))
    return read_records(tmp_path / "sweep.csv")


def test_findings_say_what_their_interval_says(written: Path, records: list[Record]) -> None:
    sweep = read_sweep(written, "quick")
    higher = Comparison("mt_bench", {"cai.every": 1, "cai.iterations": 50}, {"cai.every": 1, "cai.iterations": 5})
    moved = [
        {**r, "value": float(r["value"]) + 0.01} if (r["point"], r["seed"]) == (point_name(higher.treated), "1") else r
        for r in records
    ]
    assert finding(higher, moved) == (
        "MT-Bench is higher, every=1 iterations=50 (7.02) against every=1 iterations=5 (2.51): +4.50 [+4.44, +4.57] "
        "points over 2 seeds."
    )
    back = Comparison("mt_bench", higher.control, higher.treated)
    assert finding(back, moved).startswith("MT-Bench is lower, every=1 iterations=5 (2.51) against every=1")
    same = Comparison("advbench_harmless", sweep.findings[0].treated, sweep.findings[0].control)
    assert finding(same, records).startswith("AdvBench cannot be told apart")
    assert finding(Comparison("hhh_letter", same.treated, same.control), records).endswith("not measured.")


def test_tidy_rows_and_plot_hold_every_point(written: Path, records: list[Record], tmp_path: Path) -> None:
    sweep = read_sweep(written, "quick")
    assert len(records) == 5 * 2 * 2 and {record["seed"] for record in records} == {"0", "1"}
    chosen = [r for r in records if (r["cai.iterations"], r["figure"], r["seed"]) == ("50", "mt_bench", "1")]
    assert [(float(r["value"]), r["x"], r["minutes"], r["cai_minutes"], r["commit"]) for r in chosen] == [
        (pytest.approx(7.02), "50.0", "1.5", "0.5", "0123456789")
    ]
    write_plot(sweep, records, tmp_path / "sweep.png")
    picture = imread(tmp_path / "sweep.png")
    assert picture.shape[1] > 900 and picture[..., :3].std() > 0.02


@pytest.mark.parametrize("text", ["", "point,seed\na,1\n"])
def test_what_is_no_file_of_records_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="is no file of a sweep's records"):
        read_records(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", [0, 1, 2]), ("3,5, 8", [3, 5, 8]), ("7", [7]), ("1-2,4", [1, 2, 4])]
)
def test_seeds_are_read(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "2-1", "1,1", "0-1,1", "-1", "1.5"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_a_published_command_leaves_this_machine_out() -> None:
    argv = ["--seeds", "0-1", "record.dir=/home/me", "eval.advbench=a b", "--publish"]
    assert made_by("fedsim x", argv) == "`fedsim x --seeds 0-1 'eval.advbench=a b'`"


def test_the_quick_table_is_the_papers_cohort() -> None:
    config = load_config(ROOT / "configs" / "table1.yaml")
    assert (config.federation.num_rounds, config.federation.clients_per_round, config.local.steps) == (8, 5, 25)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_of_an_axis_keep_their_distance(places: list[float]) -> None:
    places.sort()
    shown = [place for place, free in zip(places, _far_enough(places), strict=True) if free]
    assert all(b - a >= 0.045 for a, b in itertools.pairwise(shown)) and shown[:1] == places[:1]
    hidden = [place for place, free in zip(places, _far_enough(places), strict=True) if not free]
    assert all(any(0 <= place - near < 0.045 for near in shown) for place in hidden), "none is left out without need"


@pytest.mark.parametrize(
    ("values", "kind"), [([0, 5, 50, 200], "log"), ([0.3, 0.7], "linear"), ([5, "epoch"], "text"), ([0], "linear")]
)
def test_axes_by_their_values(values: list[Any], kind: str) -> None:
    assert _scale(values) == kind
