"""The GPU's checks, driven at micro sizes on the CPU: what is right passes, what is broken is named."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fedsim.attention.backends import BACKENDS, Sdpa  # noqa: E402
from tools import gpu_check  # noqa: E402
from tools.gpu import demo, parity, shapes  # noqa: E402
from tools.gpu.report import Check, Report, Setting  # noqa: E402


def test_a_dry_run_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checks.json"
    assert gpu_check.main(["--dry-run", "--parts", "sums", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert {"device", "driver", "versions", "commit", "dirty", "date", "seconds"} <= content.keys()
    assert content["dry_run"] and content["checks"]
    assert all(check["passed"] for check in content["checks"])
    assert {"name", "error", "tolerance", "passed", "seconds"} <= content["checks"][0].keys()
    assert "0 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "why"),
    [("import sys; sys.exit('no room')", "no room"), ("import time; time.sleep(60)", "ended after 1 s")],
)
def test_a_part_that_breaks_off_or_hangs_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    monkeypatch.setattr(gpu_check, "CHILD", [sys.executable, "-c", code])
    monkeypatch.setattr(gpu_check, "PARTS", {"tiny": ("tiny", 480), "memory": ("memory", 480)})
    out = tmp_path / "checks.json"
    assert gpu_check.main(["--dry-run", "--parts", "tiny", "--budget-s", "1", "--out", str(out)]) == 1
    (check,) = json.loads(out.read_text())["checks"]
    assert check["passed"] is False and check["error"] is None and why in check["note"]


def checks_of_attention() -> list[Check]:
    setting = Setting(torch.device("cpu"), True, Path())
    report = Report("shapes")
    parity.check_all(report, shapes.random_sides(shapes.shapes_bench(setting)), "micro")
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
