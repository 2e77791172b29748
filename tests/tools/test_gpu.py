"""The calls of a session on a GPU, driven at micro sizes on the CPU: results come back, what is broken is named."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fedsim.attention.backends import BACKENDS, Sdpa  # noqa: E402
from fedsim.base.journal import Journal  # noqa: E402
from fedsim.commands import costs  # noqa: E402
from fedsim.fused import ops  # noqa: E402
from fedsim.study.bench_rows import Correctness, Percentiles, Row, StageResult  # noqa: E402
from tools.bench import run as bench_run  # noqa: E402
from tools.bench.models import GPU  # noqa: E402
from tools.bench.stage import Bench  # noqa: E402
from tools.gpu import __main__ as command  # noqa: E402
from tools.gpu import bench, demo, fused, parity, session, shapes, take, whole  # noqa: E402
from tools.gpu.calls import CALLS, RESERVE_S, Part, chosen, part_limit  # noqa: E402
from tools.gpu.report import Check, Report, Setting  # noqa: E402

COMMIT = "0123456789" * 4
FILES = ["check.json", "check.log", "check.tar.gz"]
CPU = torch.device("cpu")

PART = """
import json, pathlib, sys, time
part, words = sys.argv[2], sys.argv
work = pathlib.Path(words[words.index("--work") + 1])
check = {"part": part, "name": "right", "error": 0.0, "tolerance": 0.0, "passed": True}
(work / "lines").write_text(json.dumps(check) + "\\n" + json.dumps({"figure": "argv", "value": words}) + "\\n" + '{"cu')
(work / "keep" / "rows").mkdir()
(work / "keep" / "rows" / "a.json").write_text(part)
(work / "keep" / "model.safetensors").write_text("no weights come back")
print("begun", flush=True)
if part == "raises":
    raise ValueError("no room")
if part == "slow":
    time.sleep(60)
"""
"""Stands for tools.gpu.child: a good part, one that raises, one that overruns."""


def test_what_breaks_off_or_overruns_fails_alone_and_three_files_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "CHILD", [sys.executable, "-c", PART])
    parts = {name: Part("", share) for name, share in (("good", 9), ("raises", 9), ("slow", 0.5), ("last", 9))}
    status = session.run_call("check", parts, tmp_path, limit_s=RESERVE_S + 30, dry=True, commit=COMMIT)
    assert status == 1 and sorted(path.name for path in tmp_path.iterdir()) == FILES
    content = json.loads((tmp_path / "check.json").read_text())
    assert {"device", "driver", "versions", "date", "seconds"} <= content.keys()
    assert content["commit"] == COMMIT and content["dry_run"]
    found = content["parts"]
    assert [found[name]["status"] for name in parts] == ["ok", "failed", "stopped", "ok"]
    assert found["raises"]["message"] == "exit status 1: ValueError: no room"
    assert found["slow"]["message"].startswith("stopped after ")
    for name in parts:  # what a part had found is kept
        assert found[name]["checks"][0]["name"] == "right" and COMMIT in found[name]["figures"]["argv"]
        assert len(found[name]["checks"]) == 1 + (name in ("raises", "slow"))
    with tarfile.open(tmp_path / "check.tar.gz") as archive:
        assert archive.getnames() == [f"{name}/rows/a.json" for name in parts]
    shown = capsys.readouterr().out
    assert "4 ok, 2 FAILED, 0 left out" in shown and "no room" in shown


def test_a_call_that_is_ended_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHILD", [sys.executable, "-c", PART])

    def end() -> None:
        deadline = time.monotonic() + 20
        while b"begun" not in (tmp_path / "check.log").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "check.log").touch()
    threading.Thread(target=end).start()
    with pytest.raises(SystemExit, match="143"):
        session.run_call("check", {"slow": Part("", 1)}, tmp_path, limit_s=60, dry=True, commit=COMMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    part = json.loads((tmp_path / "check.json").read_text())["parts"]["slow"]
    assert part["status"] == "stopped" and part["checks"][0]["name"] == "right"


def test_a_part_for_which_no_time_is_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHILD", [sys.executable, "-c", PART])
    assert session.run_call("check", {"a": Part("", 1)}, tmp_path, limit_s=RESERVE_S, dry=True, commit=None) == 1
    part = json.loads((tmp_path / "check.json").read_text())["parts"]["a"]
    assert part["status"] == "not begun" and "time was up" in part["message"]


def test_a_real_part_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tree without .git is told its commit; a part that is alone gets the whole limit."""
    monkeypatch.setattr(command, "ROOT", tmp_path)
    words = ["check", "--parts", "sums", "--dry-run", "--out", str(tmp_path / "out"), "--limit-s", "100"]
    assert command.main([*words, "--commit", COMMIT]) == 0
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    (part,) = content["parts"].values()
    assert content["commit"] == COMMIT and 91 < part["limit_s"] <= 92
    assert part["checks"] and all(check["passed"] for check in part["checks"])
    assert part["figures"]["packages that need not be there, and were loaded"] == []
    assert "0 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["check"], "needs --out"),
        (["check", "--out", "x", "--parts", "nothing", "--dry-run"], "no part nothing"),
        (["check", "--out", "x", "--commit", "HEAD"], "40 hexadecimal digits"),
        (["check", "--out", "x"], "needed in a tree without .git"),
        (["take"], "name the folder"),
    ],
)
def test_mistakes_of_the_command_line_are_named(
    words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        command.main(words)
    assert error in capsys.readouterr().err


def test_limits_fit_a_machine_that_ends_a_command_after_ten_minutes() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name, call in CALLS.items():
        minutes, seconds = divmod(round(call.limit_s), 60)
        assert f"| `{name}` | {minutes} min {seconds:02} s |" in page
        shares = sum(part.share_s for word, part in call.parts.items() if word not in call.extra)
        assert shares + RESERVE_S <= call.limit_s < 600
    assert sum(call.limit_s for call in CALLS.values()) <= 28 * 60
    assert list(chosen(CALLS["check"], "")) == [name for name in CALLS["check"].parts if name != "demo"]
    assert part_limit(100.0, [1, 3]) == 25 and part_limit(100.0, [7]) == 100


def test_hidden_packages_are_as_if_they_were_not_installed() -> None:
    code = """
import importlib.util, subprocess, sys
from tools.gpu import without
assert importlib.util.find_spec("yaml")
without.hide(["yaml"])
without.hide_as_told()  # again: a part may lead into a run that is told too
assert importlib.util.find_spec("yaml") is None and importlib.util.find_spec("numpy")
child = "from tools.gpu import without; without.hide_as_told(); import yaml"
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
sys.exit("No module named 'yaml'" not in done.stderr)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- parts -----------------------------------------------------------------------------------------------------------


def checks_of_attention() -> list[Check]:
    setting = Setting(CPU, True, Path())
    report = Report("shapes")
    parity.check_all(report, shapes.random_sides(shapes.shapes_bench(setting), setting), "micro")
    return [check for check in report.checks if ", sdpa: " in check.name]


def test_a_leak_between_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in checks_of_attention())
    alone = BACKENDS["eager"].spans
    monkeypatch.setattr(
        Sdpa,
        "spans",
        lambda self, q, k, v, spans, scores: alone(
            q, k, v, parity.Spans([spans.num_queries], [len(k)], device=q.device), scores
        ),
    )
    failed = [check.name for check in checks_of_attention() if not check.passed]
    assert any("logits of packed rows" in name for name in failed) and any("gradient" in name for name in failed)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' plain forms stand for kernels; then the form that they are held against changes."""
    setting = Setting(CPU, True, Path())
    report = Report("fused")
    fused.run(setting, report)
    assert len(report.checks) > 20 and all(check.passed for check in report.checks)
    right = ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda gate, up: right(gate, up) * 1.01)
    wrong = Report("fused")
    fused.run(setting, wrong)
    failed = [check.name for check in wrong.checks if not check.passed]
    assert failed == [f"silu_mul, {dtype}: ‖kernel − plain‖ / ‖plain‖" for dtype in ("float32", "bfloat16")]


def test_figures_are_held_against_intervals() -> None:
    def found(strict: bool) -> list[bool]:
        report = Report("demo")
        demo.compare(
            report, "a run", {"a": (1, 2, 3), "b": (4, 5, 6)}, {"a": [2.5, 3, 4], "b": [4, 5, 6]}, strict=strict
        )
        return sorted(bool(check.passed) for check in report.checks)

    assert found(strict=True) == [False, True, True] and found(strict=False) == [True, True, True]


def test_nan_fails_and_reads_back() -> None:
    check = Check("tiny", "what", math.nan, 1.0)
    assert check.passed is False and Check.read(json.loads(json.dumps(check.entry()))).passed is False


def test_peaks_are_booked_to_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as an allocator counts it: the largest since the last reset, and never below what is held."""
    held, peak = [0], [0]

    def take(size: int) -> None:
        held[0] += size
        peak[0] = max(peak[0], held[0])

    def reset(device: Any = None) -> None:
        peak[0] = held[0]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    watch, journal = whole.Watch(torch.device("cuda")), Journal()
    with watch.watching():
        with journal.at(stage="outer", round=1):
            take(5)
            with journal.at(stage="inner"):
                take(20)
                take(-20)
            take(3)
        assert torch.cuda.max_memory_allocated() == 25, "the run reads its own peak as ever"
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 8
        with journal.at(stage="inner"):
            take(1)
    stages = {name: (stage.times, stage.peak_bytes) for name, stage in watch.stages.items()}
    assert stages == {"inner": (2, 25), "outer": (1, 8)}
    assert journal.place == {} and torch.cuda.max_memory_allocated() == 9


class TwoRows:
    """A stage that is ended after its first row."""

    def check(self, bench: Bench) -> list[Correctness]:
        return [Correctness("fine", 0.0, 1.0)]

    def time(self, bench: Bench) -> Iterator[Row]:
        yield Row("attention", "first", "bfloat16", {}, Percentiles(1.0, 1.0, 1.0), repeats=1)
        raise RuntimeError("time is up")


def test_rows_that_were_timed_before_the_end_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_stage", lambda name: TwoRows())
    monkeypatch.setattr(bench_run, "git_state", lambda *_: None)
    setting = Setting(CPU, False, tmp_path, tmp_path / "keep", commit=COMMIT)
    with pytest.raises(RuntimeError):
        bench.run(setting, Report("attention"), "attention")
    (file,) = (tmp_path / "keep").rglob("attention.json")
    result = StageResult.read(file)
    assert [row.name for row in result.rows] == ["first"] and result.facts["commit"] == COMMIT


# --- taking over ---------------------------------------------------------------------------------------------------


def results_of_a_gpu(folder: Path, **changed: Any) -> None:
    """What the call bench would bring back of an H200."""
    facts = {
        "device": "NVIDIA H200", "threads": 1, "model": GPU.name, "date": "2026-12-01T00:00:00", "commit": COMMIT,
        "code": "", "versions": {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.2", "trl": None},
    }  # fmt: skip
    row = Row("local_step", f"{costs.FAST}, dropout 0.05", "bfloat16", {}, Percentiles(0.1, 0.1, 0.1), floor_s=0.05)
    folder.mkdir()
    StageResult("local_step", facts, [], [row]).write(folder / "local_step.json")
    with tarfile.open(folder / "bench.tar.gz", "w:gz") as archive:
        archive.add(folder / "local_step.json", "local_step/rows/nvidia-h200/local_step.json")
        for place in ("local_step/rows/../evil.json", "run/metrics.jsonl"):
            archive.addfile(tarfile.TarInfo(place), io.BytesIO())
    (folder / "local_step.json").unlink()
    call = {"device": "NVIDIA H200", "commit": COMMIT, "dry_run": False, "parts": {}, **changed}
    (folder / "bench.json").write_text(json.dumps(call))


def test_taken_rows_are_what_costs_are_measured_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results_of_a_gpu(tmp_path / "out")
    rows, results = tmp_path / "rows", tmp_path / "results"
    assert take.take(tmp_path / "out", rows, results) == 0
    files = [path.relative_to(tmp_path).as_posix() for path in (*rows.rglob("*.json"), *results.rglob("*.json"))]
    assert files == ["rows/nvidia-h200/local_step.json", "results/nvidia-h200/bench.json"]
    measured = costs.read(costs.chosen(None, costs.committed(rows)))
    assert measured.projects and measured.pieces["local_step"].seconds == 0.1
    assert "fedsim costs --page" in capsys.readouterr().out


@pytest.mark.parametrize(("changed", "why"), [({"dry_run": True}, "dry run"), ({"commit": None}, "--commit")])
def test_what_is_no_measurement_is_not_taken(
    changed: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results_of_a_gpu(tmp_path / "out", **changed)
    assert take.take(tmp_path / "out", tmp_path / "rows", tmp_path / "results") == 2
    assert why in capsys.readouterr().err and not (tmp_path / "rows").exists()
    assert take.take(tmp_path / "rows") == 2 and "holds no check.json" in capsys.readouterr().err


@pytest.mark.deep
@pytest.mark.parametrize("call", CALLS)
def test_a_dry_run_of_a_call_in_a_tree_without_git(call: str, tmp_path: Path) -> None:
    """All parts of a call, with packages hidden that a machine with a GPU may lack."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fedsim", "launch", "tools", "configs", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    words = [sys.executable, "-m", "tools.gpu", call, "--dry-run", "--out", str(out), "--commit", COMMIT]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)
    content = json.loads((out / f"{call}.json").read_text())
    assert content["commit"] == COMMIT and all(part["status"] == "ok" for part in content["parts"].values())
    with tarfile.open(out / f"{call}.tar.gz") as archive:
        rows = [name for name in archive.getnames() if "/rows/" in name]
        for name in rows:
            file = archive.extractfile(name)
            assert file is not None and json.load(file)["facts"]["commit"] == COMMIT
        assert bool(rows) == (call in ("bench", "generation"))
        assert (call == "whole") == ("run/run/whole/metrics.jsonl" in archive.getnames())
