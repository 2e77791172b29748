"""The guard's part of the summary: Table 2, the sweep of the guard that filtered, categories side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.record.metrics import Row
from fedsim.report.guard_section import COLUMNS, guard, read_tables

MakeRun = Callable[..., list[Row]]
SWEEP = "point,threshold,which,num_unsafe,accuracy,precision,recall,hmean,fpr,dropped_share,red_share_after\n"
CATEGORIES = "point,label,category,num_rows,num_unsafe,unsafe_share,low,high\n"


def write(folder: Path, hard: bool = False) -> None:
    """Files of two points: the sweep's first point is the untuned guard's."""
    lines = [f"untuned,{t},,0,70,,0,0,0,0,30" for t in (0.1, 0.5)]
    marks = {0.5: "of the run"}
    lines += [
        f"fine-tuned,{t},{marks.get(t, '')},{9 if hard else 99 - i},{60 + i},50,40,45,20,10,25.04"
        for i, t in enumerate((0.05, 0.1, 0.45, 0.5, 0.9))
    ]
    lines.append(f"fine-tuned,0.12345,best Hmean on these rows,{9 if hard else 1},80,70,60,65,5,20,")
    (folder / "sweep.csv").write_text(SWEEP + "\n".join(lines) + "\n", encoding="utf-8")
    kinds = ["untuned,red,unethical,1200,0,0.0,0.0,0.3", "untuned,acceptable,etc,3,3,100.0,43.8,100.0"]
    kinds += ["fine-tuned,red,unethical,1200,900,75.0,72.5,77.4"]
    (folder / "categories.csv").write_text(CATEGORIES + "\n".join(kinds) + "\n", encoding="utf-8")


def lines_of(parts: list[str], title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its rule."""
    table = parts[parts.index(title) + 1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2:])]


def test_the_sweep_is_that_of_the_guard_that_filtered(make_run: MakeRun, tmp_path: Path) -> None:
    write(tmp_path)
    head, *rows = lines_of(guard(make_run(), "llama_guard", read_tables(tmp_path)), "### Threshold sweep")
    assert head[0] == "threshold" and head[-1] == "red % after" and len(head) == 8
    assert [row[0] for row in rows] == ["0.1", "0.5, of the run", "0.9", "0.1235, best Hmean on these rows"]
    assert rows[0][1:] == ["61.0", "50.0", "40.0", "45.0", "20.0", "10.0", "25.0"]
    assert rows[-1][-1] == "undefined"


def test_categories_stand_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    write(tmp_path)
    head, *rows = lines_of(guard(make_run(), "llama_guard", read_tables(tmp_path)), "### Response categories")
    assert head == ["response category", "rows", "untuned: called unsafe %", "fine-tuned: called unsafe %"]
    assert rows == [
        ["red: unethical", "1,200", "0.0 [0.0, 0.3]", "75.0 [72.5, 77.4]"],
        ["acceptable: etc", "3", "100.0 [43.8, 100.0]", ""],
    ]


def test_verdicts_without_probabilities_have_no_sweep(make_run: MakeRun, tmp_path: Path) -> None:
    write(tmp_path, hard=True)
    parts = guard(make_run(), "noisy_oracle", read_tables(tmp_path))
    assert "### Threshold sweep" not in parts and "### Response categories" in parts


def test_without_files_the_table_stands_alone(make_run: MakeRun, tmp_path: Path) -> None:
    assert read_tables(tmp_path / "absent") == {}
    assert len(guard(make_run(), "llama_guard", {})) == 3
    assert guard([row for row in make_run() if row["stage"] != "guard"], "none", {}) == []


@pytest.mark.parametrize(
    ("count", "words"),
    [
        ("num_dropped", "are left out"),
        ("num_refused", "are given a refusal for a response"),
        ("num_downweighted", "are downweighted"),
    ],
)
def test_the_action_and_the_intervals_are_told(make_run: MakeRun, count: str, words: str) -> None:
    rows = make_run()
    rows[0][f"guard/{count}"] = rows[0].pop("guard/num_dropped")
    text = guard(rows, "llama_guard", {})[2]
    assert f"Rows called unsafe {words}." in text and text.count("Rows called unsafe") == 1
    assert "AUPRC [59.0, 63.9]." in text and "Its Brier score: 0.188." in text
    assert "AUPRC %" in COLUMNS.values() and "ECE %" in COLUMNS.values()
