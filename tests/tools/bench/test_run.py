"""The runner: correct first, then timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fedsim.study.bench_rows import Correctness, Percentiles, Row, StageResult
from tools.bench import run
from tools.bench.models import CPU, GPU, MICRO, build
from tools.bench.stage import Bench, LeftOut


@dataclass
class FakeStage:
    """A stage whose check has ``error``."""

    name: str = "fake"
    error: float = 0.0
    part: str = ""
    breaks: Exception | None = None
    timed: list[str] = field(default_factory=list)

    def check(self, bench: Bench) -> list[Correctness]:
        if self.breaks is not None:
            raise self.breaks
        return [Correctness("fine", 0.0, 1.0), Correctness("ours and theirs", self.error, 1.0, part=self.part)]

    def time(self, bench: Bench) -> list[Row]:
        self.timed.append(self.name)
        assert bench.wrong == ({self.part} if self.error > 1 else set())
        return [Row(self.name, "work", bench.dtype_name, {}, Percentiles(1.0, 1.0, 1.0), repeats=1)]


def bench(said: list[str]) -> Bench:
    return Bench(torch.device("cpu"), MICRO, threads=1, repeats=2, budget_s=0.0, say=said.append)


def test_a_correct_stage_is_timed_and_its_rows_are_written(tmp_path: Path) -> None:
    said: list[str] = []
    assert run.run([FakeStage()], bench(said), tmp_path) == 0
    result = StageResult.read(tmp_path / "fake.json")
    assert [row.name for row in result.rows] == ["work"] and len(result.correctness) == 2
    assert {"device", "threads", "versions", "commit", "date"} <= result.facts.keys()
    assert "trl" in result.facts["versions"]
    assert said[-1].splitlines()[-1].startswith("fake")


def test_a_stage_that_is_wrong_is_not_timed_and_fails_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    wrong, right = FakeStage("wrong", error=1.5), FakeStage("right")
    assert run.run([wrong, right], bench(said), tmp_path) == 1
    assert wrong.timed == [] and right.timed == ["right"]
    assert [p.name for p in tmp_path.iterdir()] == ["right.json"]
    assert any("FAILED: ours and theirs" in line for line in said) and "wrong" in said[-1]


def test_a_part_that_is_wrong_fails_the_run_but_not_the_other_parts(tmp_path: Path) -> None:
    said: list[str] = []
    stage = FakeStage(error=1.5, part="eager")
    assert run.run([stage], bench(said), tmp_path) == 1
    assert stage.timed == ["fake"] and (tmp_path / "fake.json").is_file()
    assert said[-1].endswith("fake (eager)")


def test_a_stage_that_breaks_off_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken, right = FakeStage("broken", breaks=RuntimeError("no\nroom")), FakeStage("right")
    assert run.run([broken, right], bench(said), tmp_path) == 1
    assert right.timed == ["right"] and "broken: FAILED: RuntimeError: no" in said
    assert "broken (RuntimeError)" in said[-1] and any(line.splitlines()[-1].startswith("right") for line in said)


def test_a_stage_that_cannot_be_run_here_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    assert run.run([FakeStage(breaks=LeftOut("no datasets"))], bench(said), tmp_path) == 0
    assert "fake: left out: no datasets" in said


def test_stages_share_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the minutes are half the seconds; what would begin too late is named."""
    now, said, budgets = [0.0], [], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(FakeStage):
        def time(self, bench: Bench) -> list[Row]:
            budgets.append(bench.budget_s)
            now[0] += 301.0
            return super().time(bench)

    stages = [Slow("guard"), Slow("engine")]
    assert run.run(stages, bench(said), tmp_path, minutes=run.MINUTES / 2) == 0
    assert budgets == [run.SHARES["guard"][0] / 2] and "engine: left out, the 5 minutes are over" in said


def test_shares_add_up_to_the_minutes() -> None:
    for which in (0, 1):
        assert sum(share[which] for share in run.SHARES.values()) <= 60 * run.MINUTES


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--stages", "nothing"])
    assert "no stage nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", run.STAGES)
def test_every_listed_stage_can_be_loaded(name: str) -> None:
    assert run.load_stage(name).name == name


def test_a_device_name_becomes_a_folder() -> None:
    assert run.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_models_have_the_stated_sizes_and_the_same_weights_every_time() -> None:
    model = build(CPU, torch.float32, torch.device("cpu"))
    assert model.num_parameters() == 5_795_072
    again = build(CPU, torch.float32, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    large = build(GPU, torch.bfloat16, torch.device("meta"))
    assert large.num_parameters() == 8_030_261_248  # as its model card counts
    assert {p.dtype for p in large.parameters()} == {torch.bfloat16}
