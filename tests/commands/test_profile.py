"""The round profiler as a user runs it: one table that agrees with the metrics, and a trace that holds the phases."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsim.base.errors import ConfigError, RunError
from fedsim.commands import profile
from fedsim.record.metrics import read_rows

ROOT = Path(__file__).parents[2]
SMALL = "tests/distributed/small.yaml"


@pytest.fixture(scope="module")
def profiled(square_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, Path]:
    """Lines of standard output, standard error, and the run directory of a profiled round."""
    folder = tmp_path_factory.mktemp("profile")
    words = [f"data.square={square_file}", f"record.dir={folder}", f"record.artefacts={folder / 'artefacts'}",
             "guard.kind=noisy_oracle", "federation.clients_per_round=2", "local.steps=1", "cai.iterations=1",
             "eval.limit=1", "eval.advbench=", "eval.mt_bench=", "eval.xstest=", "eval.helpful="]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "profile", SMALL, *words], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), done.stderr, folder / "small-profile"


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"{name}  ")]
    return re.split(r"\s{2,}", line.strip())


def test_the_table_is_the_measured_rounds_row(profiled: tuple[list[str], str, Path]) -> None:
    lines, errors, folder = profiled
    assert "USDT" not in errors and not (folder / "wandb").exists()
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "round"]
    assert [row["round"] for row in rows] == [1, 2, 2]  # once to measure, once for the trace
    row = rows[1]
    assert rows[2]["global/checksum"] == row["global/checksum"]  # the same work
    assert any(
        line == "Round 2 of small: FedAvg, FL + noisy oracle filter + CAI; 1 process on cpu, 1 thread(s) each"
        for line in lines
    )
    title, seconds, _, tokens, speed, _, fraction, _ = cells(lines, "local training")
    assert title == "local training" and float(seconds) == pytest.approx(row["parallel/makespan_s"], abs=1e-3)
    assert tokens == f"{row['perf/tokens']:,}" and fraction == f"{100 * row['perf/roofline']:.1f} %"
    assert float(speed.replace(",", "")) == pytest.approx(row["perf/tokens_per_s"], abs=1)
    parts = ["local training", "aggregation", "constitutional AI", "evaluation", "everything else"]
    total = float(cells(lines, "whole round")[1])
    assert sum(float(cells(lines, part)[1]) for part in parts) == pytest.approx(total, abs=0.003)
    assert total == pytest.approx(row["perf/round_s"], abs=1e-3)
    assert cells(lines, "MFU, local training")[1] == f"{100 * row['perf/mfu']:.1f} %"
    assert f"({row['parallel/comm_bytes']:,} bytes" in cells(lines, "communicated")[1]
    assert cells(lines, "idle while training")[1].startswith(f"{100 * row['parallel/idle_share']:.1f} % of 1 process,")


def test_the_trace_holds_the_rounds_phases(profiled: tuple[list[str], str, Path]) -> None:
    lines, _, folder = profiled
    path = folder / "trace-round2.json.gz"
    assert str(path) in cells(lines, "trace of rank 0")[1]
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X"]
    phases = {e["name"]: e["dur"] / 1e6 for e in spans if e["name"].startswith("phase: ")}
    assert set(phases) == {"phase: train", "phase: aggregate", "phase: cai", "phase: evaluate"}
    again = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "round"][2]
    assert phases["phase: train"] == pytest.approx(again["time/train_s"], rel=0.2, abs=0.05)
    assert any("mm" in e["name"] for e in spans)


def test_a_round_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--round 4: must be >= 1 and <= federation\.num_rounds \(now 3\)"):
        profile.parse([str(ROOT / SMALL), "--round", "4"])


def test_a_directory_that_is_no_profiles_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "small-profile" / "summary.md"
    kept.parent.mkdir()
    kept.write_text("a user's run")
    with pytest.raises(ConfigError, match="was not made by a profile"), profile.own_directory(kept.parent):
        pass
    assert kept.read_text() == "a user's run"


def test_one_profile_at_a_time_and_the_next_one_clears(tmp_path: Path) -> None:
    folder = tmp_path / "small-profile"
    with profile.own_directory(folder):
        (folder / ".lock").touch()
        (folder / "checkpoints").mkdir()
        with (
            pytest.raises(ConfigError, match="another process is profiling this very run"),
            profile.own_directory(folder),
        ):
            pass
        assert sorted(p.name for p in folder.iterdir()) == [".lock", ".profile", "checkpoints"]
    with profile.own_directory(folder):
        assert [p.name for p in folder.iterdir()] == [".profile"]


def test_a_trace_that_cannot_be_written_is_an_error_before_the_run(tmp_path: Path) -> None:
    for wrong in ("trace", "trace.gz", "trace.json.zip"):
        with pytest.raises(ConfigError, match=rf"--trace {wrong}: must end in"):
            profile.parse([str(ROOT / SMALL), "--trace", wrong])
    (tmp_path / "file").touch()
    (tmp_path / "t.json").mkdir()
    for place in (tmp_path / "file" / "t.json", tmp_path / "t.json", Path("/proc/none/t.json")):
        with pytest.raises(ConfigError, match=rf"--trace {place}: cannot be written"):
            profile.check_trace(place)
    profile.check_trace(tmp_path / "made" / "t.json")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("writes", [lambda path: None, lambda path: Path(path).touch()], ids=["no file", "empty"])
def test_a_trace_that_was_not_written_is_not_claimed(tmp_path: Path, writes: Any) -> None:
    (tmp_path / "t.json").write_text("an earlier one")
    simulation = SimpleNamespace(trace=tmp_path / "t.json")
    with pytest.raises(RunError, match="nothing was written"):
        profile.ProfiledSimulation._export(simulation, SimpleNamespace(export_chrome_trace=writes))
    assert (tmp_path / "t.json").read_text() == "an earlier one"


def test_options_may_stand_anywhere_and_launchers_may_add_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for spelling in ("--local_rank=1", "--local-rank=1"):
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"})
        config, chosen, _ = profile.parse([spelling, str(ROOT / SMALL), "--round", "2", "seed=3"])
        assert (config.seed, chosen, os.environ["LOCAL_RANK"]) == (3, 1, "1")
    with pytest.raises(ConfigError, match=r"command line: .*--rond"):
        profile.parse([str(ROOT / SMALL), "--rond=2"])


def test_the_form_names_no_python_after_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.parse(["--help"])
    assert "[torchrun --nproc_per_node=N -m] fedsim profile" in " ".join(capsys.readouterr().out.split())


@pytest.mark.deep
def test_of_two_processes_one_tells_a_users_error_and_torchrun_ends_with_it() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "fedsim", "profile", SMALL, "--round", "9"], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(said) == 1 and said[0].startswith("error: --round 9: must be >= 1")
    assert "Root Cause" in done.stderr and done.stderr.count("--round 9: must be") >= 2


def test_the_profile_has_a_name_of_its_own_and_is_not_streamed(tmp_path: Path) -> None:
    words = [str(ROOT / SMALL), "seed=3", "wandb.mode=online", "--round", "3", "--trace", str(tmp_path / "t.json")]
    config, chosen, trace = profile.parse(words)
    assert (config.name, config.seed, config.wandb.mode) == ("small-profile", 3, "off")
    assert (chosen, trace) == (2, tmp_path / "t.json")


def test_a_row_of_a_gpu_run_is_laid_out() -> None:
    """A round without CAI or clients' traffic, with GPU memory and figures of a large model."""
    row = {
        "round": 4, "time/train_s": 2.0, "time/aggregate_s": 2.0, "perf/round_s": 4.5, "parallel/makespan_s": 3.0,
        "perf/tokens": 220000, "perf/tokens_per_s": 73333.3, "perf/flops": 6.4e15, "perf/bytes": 1e12,
        "perf/mfu": 0.27, "perf/roofline": 0.27, "perf/aggregate_roofline": 1e-4, "perf/aggregate_bytes": 3e8,
        "perf/peak_flops_per_s": 7.9e15, "perf/peak_memory_bytes_per_s": 2.7e13, "perf/peak_source": "8 x H100",
        "perf/peak_rss_bytes": 2**35, "perf/peak_gpu_bytes": 3 * 2**34, "parallel/comm_bytes": 10**9,
        "parallel/idle_share": 0.04, "parallel/planned_idle_share": 0.02, "perf/peak_spread": 0.0,
    }  # fmt: skip
    lines = profile.phase_table(row).plain().splitlines()
    assert cells(lines, "local training")[1:] == ["3.000", "66.7 %", "220,000", "73,333", "2.13 PFLOP/s", "27.0 %",
                                                  "compute"]  # fmt: skip
    assert cells(lines, "aggregation")[1:] == ["1.000", "22.2 %", "–", "–", "–", "0.0 %", "memory"]
    found = profile.totals(row, 8)
    assert found["peak GPU memory"].startswith("48.00 GiB") and found["communicated"].startswith("1,000.00 MB")
    assert found["idle while training"] == "4.0 % of 8 processes, 2.0 % planned"
    assert "MFU, constitutional AI" not in found and found["peak of all devices"].endswith("(8 x H100)")
    shaky = row | {"perf/peak_spread": 0.25}
    lines = profile.phase_table(shaky).plain().splitlines()
    assert cells(lines, "local training")[-1] == cells(lines, "aggregation")[-1] == "–"
    assert profile.totals(shaky, 8)["peak of all devices"].endswith("(8 x H100, two measurements 25 % apart)")
