"""What a CAI iteration costs: the arithmetic by a fake clock, an extrapolated epoch, a whole one, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.errors import ConfigError
from fedsim.base.ranks import OneRank
from fedsim.commands import cai_cost
from fedsim.config import CaiConfig
from fedsim.parallel.world import World
from fedsim.report import paper
from fedsim.study.cai_cost import table

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "distributed" / "small.yaml"
BRIEF = ["cai.max_new_tokens=32", "eval.batch_size=16", "cai.batch_size=2", "cai.iterations=2"]


@pytest.fixture(scope="module")
def places(square_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a small run whose conversations are written once for all tests."""
    folder = tmp_path_factory.mktemp("cai_cost")
    return [str(SMALL), *BRIEF, f"data.square={square_file}", f"record.dir={folder}",
            f"record.artefacts={folder / 'artefacts'}"]  # fmt: skip


class FakeAligner:
    """Advances a clock by 2 s a DPO step and 1 s an SFT step, and by 100 s once before anything is warm."""

    def __init__(self) -> None:
        self.cai = CaiConfig(iterations=9)
        self.now = 0.0
        self.calls: list[int] = []

    def align(self, adapter: Any, round_idx: int, lane: Any, on_step: Any) -> None:
        self.now += 0.0 if self.calls else 100.0
        self.calls.append(self.cai.iterations)
        total = 2 * self.cai.iterations
        for done in range(total):
            self.now += 1.0 if done < total // 2 else 2.0
            on_step(done + 1, total)


def cost(**changes: Any) -> Any:
    """1 s an SFT step and 2 s a DPO step; 100 rows in batches of 16."""
    given = {
        "steps": cai_cost.Steps([1.0] * 3, [2.0] * 3),
        "extrapolated_from": 3,
        "full_epoch": False,
        "num_rows": 100,
        "batch_size": 16,
        "round_iterations": 2,
        "num_rounds": 4,
        "written_rows": 10,
        "written_s": 5.0,
        "asked_rows": 120,
    }
    return cai_cost.Cost(**given | changes)


def test_steps_are_timed_apart_and_the_first_does_not_count() -> None:
    fake = FakeAligner()
    steps = cai_cost.timed_steps(fake, torch.zeros(1), None, 3, clock=lambda: fake.now)
    assert fake.calls == [1, 3]
    assert steps == cai_cost.Steps([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert steps.iteration_s == 3.0


def test_the_device_is_waited_for_before_every_look_at_the_clock() -> None:
    fake, waited = FakeAligner(), []
    cai_cost.timed_steps(fake, torch.zeros(1), None, 2, clock=lambda: fake.now, wait=lambda: waited.append(fake.now))
    assert len(waited) == (1 + 2) + (1 + 4)


@pytest.mark.parametrize(("rows", "size", "want"), [(20_000, 16, 1250), (100, 16, 7), (96, 16, 6), (1, 16, 1)])
def test_iterations_of_an_epoch(rows: int, size: int, want: int) -> None:
    assert cai_cost.epoch_iterations(rows, size) == want


def test_what_follows_from_an_iteration() -> None:
    found = cost()
    assert (found.epoch_iterations, found.epoch_s, found.writing_s) == (7, 21.0, 60.0)
    whole = cost(full_epoch=True, steps=cai_cost.Steps([1.0] * 3 + [3.0] * 4, [2.0] * 7))
    assert whole.epoch_s == 29.0, "measured, not extrapolated"
    assert whole.extrapolated_s == 21.0, "by its first three iterations"


def test_the_papers_table() -> None:
    assert paper.CAI_EPOCH_ITERATIONS == 1250
    lines = {line[0]: [cell.strip() for cell in line[1:]] for line in table(cost()).rows}
    assert lines["iterations of an epoch"] == ["1,250", "1,250", "7"]
    assert lines["one iteration (SFT + DPO step)"] == ["3.84 s", "3 s", "3 s"]
    assert lines["a round with a whole epoch"] == ["1 h 20 min", "1 h 02 min", "21 s"]
    assert lines["a round with few iterations"] == ["3 min 12 s", "2 min 30 s", "6 s"]
    assert lines["saved by that"] == ["-96 %", "-96 %", "-71 %"]
    assert lines["all rounds with an epoch each"] == ["66 h 40 min", "52 h 05 min", "1 min 24 s"]
    assert lines["all rounds with few iterations"] == ["2 h 40 min", "2 h 05 min", "24 s"]
    assert lines["writing them"] == ["not stated", "2 h 46 min", "1 min 00 s"]


def run(words: list[str]) -> Any:
    return cai_cost.measure(cai_cost.parse(words), World(OneRank(), torch.device("cpu"), exact=True))


def test_an_epoch_is_extrapolated_from_three_iterations(places: list[str]) -> None:
    found = run([*places, "--iterations", "3", "cai.every=2"])
    assert (found.round_iterations, found.num_rounds) == (2, 2), "of three rounds the second and the last have CAI"
    assert len(found.steps.sft_s) == len(found.steps.dpo_s) == found.extrapolated_from == 3
    assert all(seconds > 0 for seconds in found.steps.sft_s + found.steps.dpo_s)
    assert 0 < found.num_rows <= found.asked_rows == 12 and found.written_rows == 12 and found.written_s > 0
    assert found.epoch_s == pytest.approx(found.epoch_iterations * found.steps.iteration_s)
    assert found.epoch_iterations == -(-found.num_rows // 2)


def test_the_whole_epoch_is_run_and_written_down(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "row.json"
    words = [*places, "cai.batch_size=5", "--full-epoch", "--iterations", "1", "--json", str(file)]
    cai_cost.cost_of(cai_cost.parse(words))
    entry = json.loads(file.read_text())
    assert len(entry["steps"]["sft_s"]) == entry["epoch_iterations"] == -(-entry["num_rows"] // 5)
    assert entry["epoch_s"] == pytest.approx(sum(entry["steps"]["sft_s"]) + sum(entry["steps"]["dpo_s"]))
    foretold = entry["epoch_iterations"] * (entry["steps"]["sft_s"][0] + entry["steps"]["dpo_s"][0])
    assert entry["extrapolated_s"] == pytest.approx(foretold)
    printed = capsys.readouterr().out
    assert "paper, 4 x A100" in printed and "first 1 iteration(s) would have foretold" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--iterations", "0"], "--iterations 0: must be >= 1"),
        (["cai.iterations=0"], "cai.iterations=0: this configuration has no CAI"),
        (["a.yaml", "b.yaml"], "one config file at most"),
        (["--nonsense"], "command line"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cai_cost.parse(words)
    assert "\n" not in str(caught.value)


def test_guard_benchmarks_and_judge_need_not_be_there() -> None:
    words = ["guard.path=/nowhere", "eval.advbench=/nowhere.csv", "judge.kind=openai", "eval.guard_judge=tuned"]
    config = cai_cost.parse(words).config
    assert config.guard.kind == "none" and config.eval.advbench == "" and config.judge.kind == "none"
    assert config.cai == cai_cost.load_config(cai_cost.DEFAULT, []).cai
