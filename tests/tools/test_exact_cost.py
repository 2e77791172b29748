"""What exact mode costs: phases from rows by hand, turns, ratios of turns, a stand-in's runs, and mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedsim.base.errors import RunError
from fedsim.study.bench_rows import StageResult
from tools import exact_cost, running
from tools.exact_cost import Setting, phases, rows_of, take_turns

FOUR = [Setting(count, exact) for count in (1, 4) for exact in (True, False)]
FAKE = """
import json, os, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(words["record.dir"]) / words["name"]
folder.mkdir(parents=True)
slow = 3.0 if words["parallel.exact"] == "true" else 2.0
with (folder / "metrics.jsonl").open("w") as file:
    for r in range(1, int(words["federation.num_rounds"]) + 1):
        row = {"round": r, "stage": "round", "time/train_s": slow, "time/cai_s": 1.0, "perf/round_s": slow + 1.5}
        if r == 3:
            row |= {"time/evaluate_s": 10.0, "perf/round_s": slow + 11.5}
        file.write(json.dumps(row) + "\\n")
"""


def row(number: int, stage: str = "round", **seconds: float) -> dict[str, Any]:
    return {"round": number, "stage": stage, **{name.replace("__", "/"): value for name, value in seconds.items()}}


def test_phases_leave_out_the_first_round_and_a_rounds_evaluation() -> None:
    rows = [
        row(0, "prepare", time__train_s=99.0),
        row(1, time__train_s=50.0, perf__round_s=60.0),
        row(2, "eval", time__train_s=99.0),
        row(2, time__train_s=2.0, time__aggregate_s=0.5, time__evaluate_s=7.0, perf__round_s=10.0),
        row(3, time__train_s=4.0, time__cai_s=1.0, perf__round_s=6.0),
    ]
    assert phases(rows) == {
        "train": [2.0, 4.0], "aggregate": [0.5], "cai": [1.0], "evaluate": [7.0], "round": [3.0, 6.0],
    }  # fmt: skip


def test_settings_take_turns_and_none_is_always_first() -> None:
    order = take_turns(FOUR, 4)
    assert [order[start : start + 4] for start in (0, 4)] == [FOUR, [*FOUR[1:], FOUR[0]]]
    for place in range(4):
        assert {order[4 * turn + place] for turn in range(4)} == set(FOUR), "each has each place once"


def test_ratios_are_of_turns_and_spreads_of_all_rounds() -> None:
    """Two turns on a machine that was half as fast in the second: the ratio does not see it, the quartiles do."""
    empty: dict[str, list[float]] = {name: [] for name in exact_cost.PHASES}
    exact = [{**empty, "train": [3.0, 3.0]}, {**empty, "train": [6.0, 6.0]}]
    fast = [{**empty, "train": [2.0, 2.0]}, {**empty, "train": [4.0, 5.0]}]
    (found,) = rows_of(4, {Setting(4, True): exact, Setting(4, False): fast})
    assert found.name == "train" and found.shapes == {"ranks": 4, "rounds": 4, "repeats": 2}
    assert found.figures["ratio"] == pytest.approx((1.5 + 6 / 4.5) / 2)
    assert (found.figures["ratio_low"], found.figures["ratio_high"]) == pytest.approx((6 / 4.5, 1.5))
    assert (found.figures["exact_low_s"], found.figures["exact_s"], found.figures["exact_high_s"]) == (3.0, 4.5, 6.0)
    (line,) = exact_cost.table([found]).rows
    assert line == ["4", "local training", "4.5 [3, 6]", "3 [2, 4.25]", "1.42 [1.33, 1.50]"]


def test_from_the_command_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the run, whose exact mode takes 3 s where the fast one takes 2 s to train."""
    fake, file = tmp_path / "fake.py", tmp_path / "a-cpu" / running.FOLDER / "exact_cost.json"
    fake.write_text(FAKE)
    asked: list[int] = []

    def command(count: int, words: list[str]) -> list[str]:
        asked.append(count)
        return [sys.executable, str(fake), *words]

    monkeypatch.setattr(running, "command", command)
    monkeypatch.setattr(sys, "argv", ["exact_cost.py", "--repeats", "2", "--nproc", "1,2", "--out", str(file)])
    assert exact_cost.main() == 0, capsys.readouterr().err
    assert sorted(asked) == [1] * 6 + [2] * 6
    found = StageResult.read(file)
    by_phase = {(r.shapes["ranks"], r.name): r for r in found.rows}
    assert {phase for _, phase in by_phase} == {"train", "cai", "evaluate", "round"}, "what never ran has no row"
    assert by_phase[(2, "train")].figures["ratio"] == 1.5 and by_phase[(1, "cai")].figures["ratio"] == 1.0
    assert by_phase[(1, "round")].figures["exact_s"] == 4.5 and by_phase[(1, "round")].shapes["rounds"] == 6
    monkeypatch.setattr(running.newest_rows, "__defaults__", (tmp_path,))
    monkeypatch.setattr(exact_cost, "PAGE", tmp_path / "exact-cost.md")
    monkeypatch.setattr(sys, "argv", ["exact_cost.py", "--page"])
    assert exact_cost.main() == 0 and len(asked) == 12, "no further run"
    text = (tmp_path / "exact-cost.md").read_text()
    assert "| 2 | local training | 3 [3, 3] | 2 [2, 2] | 1.50 [1.50, 1.50] |" in text
    assert "over 2 run(s) each" in text and json.loads(file.read_text())["facts"]["words"] == []


def test_a_large_model_is_put_in_the_demos_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, file = tmp_path / "fake.py", tmp_path / "large.json"
    fake.write_text(FAKE)
    sizes: set[int] = set()

    def command(count: int, words: list[str]) -> list[str]:
        (folder,) = (Path(word.removeprefix("model.path=")) for word in words if word.startswith("model.path="))
        sizes.add(sum(t.numel() for t in load_file(folder / "model.safetensors").values()))
        assert (folder / "tokenizer.json").is_file() and "cai.iterations=0" in words and "model.lora_r=32" in words
        return [sys.executable, str(fake), *words]

    monkeypatch.setattr(running, "command", command)
    arguments = ["--large", "--repeats", "1", "--nproc", "1", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["exact_cost.py", *arguments])
    assert exact_cost.main() == 0, capsys.readouterr().err
    found = StageResult.read(file)
    assert found.stage == "exact_cost_large" and found.facts["words"] == ["--large"]
    assert len(sizes) == 1 and 5.7e6 < sizes.pop() < 5.9e6


def test_a_run_that_fails_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script, limit_s, said in (
        ("import sys; sys.exit('no luck')", 30.0, "parallel.exact=true ended with status 1: no luck"),
        ("import time; time.sleep(60)", 0.3, "took longer than --limit-s 0.3"),
    ):
        monkeypatch.setattr(running, "command", lambda count, words, script=script: [sys.executable, "-c", script])
        with pytest.raises(RunError, match=said):
            exact_cost.run(Setting(1, True), [], tmp_path, limit_s)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "1,"], "--nproc 1,: must be numbers >= 1"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["exact_cost.py", *arguments])
    assert exact_cost.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
