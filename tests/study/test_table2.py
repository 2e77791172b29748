"""Table 2: the paper's own arithmetic, and intervals against the binomial's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsim.base.errors import DataError
from fedsim.commands import table2 as command
from fedsim.report.finished import FinishedRun
from fedsim.study.published import Origin
from fedsim.study.table2 import (
    CHOSEN,
    COLUMNS,
    COUNTS,
    HEAD,
    count_rows,
    guard_table,
    intervals,
    note,
    rates,
    read_count_rows,
    untuned_note,
    write_count_rows,
)


def test_the_papers_operating_point() -> None:
    """Precision 56.7 and recall 73.7 at 30 % red: accuracy 75.2, Hmean 64.1, and 13 % red after dropping 39 %."""
    caught = 0.3 * 0.737
    alarms = caught / 0.567 - caught
    found = rates(1000 * np.array([caught, alarms, 0.3 - caught, 0.7 - alarms]))
    assert found["hmean"] == pytest.approx(64.1, abs=0.05) and found["accuracy"] == pytest.approx(75.2, abs=0.05)
    assert found["red_share_before"] == pytest.approx(30) and found["red_share_after"] == pytest.approx(13, abs=0.1)
    assert 100 * (caught + alarms) == pytest.approx(39, abs=0.1)


def test_one_seed_has_the_binomials_interval() -> None:
    mean, low, high = intervals(np.array([[300, 200, 100, 400]]))["accuracy"]  # type: ignore[misc]
    half = 1.96 * 100 * np.sqrt(0.7 * 0.3 / 1000)
    assert (mean, low, high) == pytest.approx((70.0, 70 - half, 70 + half), abs=0.15)


def test_seeds_widen_it() -> None:
    same = intervals(np.array([[300, 200, 100, 400]] * 3))["recall"]
    apart = intervals(np.array([[200, 200, 200, 400], [300, 200, 100, 400], [400, 200, 0, 400]]))["recall"]
    assert same is not None and apart is not None and same[0] == pytest.approx(apart[0])
    assert apart[2] - apart[1] > 3 * (same[2] - same[1])


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say(num_seeds: int) -> None:
    """Recall varies between seeds (Beta with mean 0.7), and rows within them."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(150):
        caught = rng.binomial(300, rng.beta(14, 6, size=num_seeds))
        found = intervals(np.stack([caught, caught * 0, 300 - caught, caught * 0 + 700], axis=1))["recall"]
        assert found is not None
        covered += found[1] <= 70 <= found[2]
    assert 0.89 < covered / 150 < 0.99


def test_a_rate_near_none_reaches_as_far_as_wilsons() -> None:
    found = intervals(np.array([[300, 0, 1, 199]]))["red_share_after"]
    assert found is not None and found[0] == pytest.approx(0.5) and 2.7 < found[2] < 2.9


def test_a_rate_of_none_reaches_as_far_as_wilsons() -> None:
    found = intervals(np.array([[0, 0, 600, 1400]] * 3))["recall"]
    assert found == (0.0, 0.0, pytest.approx(100 * 3.841459 / 603.841459, rel=1e-6))


def test_a_guard_that_calls_nothing_unsafe_has_no_precision() -> None:
    found = intervals(np.array([[0, 0, 300, 700], [10, 5, 290, 695]]))
    assert found["precision"] is None and found["recall"] is not None


def test_the_table_has_both_guards_and_the_papers(finish: Callable[..., FinishedRun], tmp_path: Path) -> None:
    def row(point: str, counts: tuple[int, ...]) -> dict[str, object]:
        named = {f"guard/{name}": count for name, count in zip(COUNTS, counts, strict=True)}
        return {"round": 0, "stage": "guard", "point": point, **named}

    runs = [
        finish(f"t{i}", [f"seed={i}"], {}, [row("untuned", (0, 0, 30, 70)), row("fine-tuned", (20, 10, 10, 60))])
        for i in (0, 1)
    ]
    write_count_rows(tmp_path / "counts.csv", count_rows(runs))
    rows = read_count_rows(tmp_path / "counts.csv")
    assert rows == count_rows(runs) and [row.seed for row in rows] == [0, 0, 1, 1]
    table = guard_table(rows)
    assert len(table.head) == 1 + len(COLUMNS)
    assert [r[0] for r in table.rows] == [
        "guard, untuned",
        "– Llama Guard 3 in the paper",
        "guard, fine-tuned",
        "– fine-tuned Llama Guard 3 in the paper",
    ]
    assert table.rows[0][2] == "undefined" and table.rows[2][1].startswith("80.0 [")
    assert table.rows[3][1:5] == ["75.5", "56.7", "73.7", "64.1"]
    assert guard_table(rows[:3]).rows[0][1] != "not measured" == guard_table(rows[:3]).rows[2][1], "of one seed alone"
    assert untuned_note(rows) == ""
    bare = [finish("bare", [], {})]
    assert guard_table(count_rows(bare)).rows[0][1] == "not measured"
    assert "guard.measure_untuned=true" in untuned_note(count_rows(bare))
    with pytest.raises(DataError, match="both have seed 0"):
        count_rows([runs[0], *bare])


@pytest.mark.parametrize("text", ["", "a,b\n", "seed,point,num_caught\n", None])
def test_a_damaged_file_of_counts_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "counts.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"counts\.csv: is no file of table 2's counts .*make the table again"):
        read_count_rows(path)


def test_a_row_of_counts_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text(",".join(HEAD) + "\n0,untuned,1,2,3,abc\n", encoding="utf-8")
    with pytest.raises(DataError, match="a row has 3 counts"):
        read_count_rows(path)


def test_the_embedded_guards_row_is_called_chosen() -> None:
    tiny = Origin("Measured here.", "`x`", (0,), "embedded", True)
    assert CHOSEN in note(tiny, []) and CHOSEN not in note(replace(tiny, embedded=False), [])


@pytest.mark.deep
def test_the_papers_configuration_fills_both_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run of configs/paper/base.yaml at micro size: the guard is measured before and after fine-tuning."""
    sizes = ["data.federated_rows=40", "data.guard_rows=20", "guard.tune_epochs=1", "local.steps=1"]
    sizes += ["federation.num_clients=2", "federation.clients_per_round=1", "federation.num_rounds=1"]
    embedded = ["model.path=embedded", "guard.path=embedded", "data.square=embedded", "model.dtype=float32"]
    embedded += [f"eval.{name}=" for name in ("advbench", "hhh", "mt_bench", "xstest")]
    places = [f"record.dir={tmp_path}", f"record.artefacts={tmp_path}/artefacts", "wandb.mode=off"]
    config = str(Path(__file__).parents[2] / "configs" / "paper" / "base.yaml")
    assert command.main([config, *sizes, *embedded, *places, "--seeds=0", "--nproc=1", "--jobs=1"]) == 0
    shown = capsys.readouterr().out
    assert "not measured" not in shown
    for guard in ("untuned", "fine-tuned"):
        assert re.search(rf"^guard, {guard} +\d+\.\d \[", shown, re.MULTILINE), shown
