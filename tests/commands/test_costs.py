"""``fedsim costs`` on the committed rows: the paper's work at 8B, labels, files and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsim.base.errors import ConfigError
from fedsim.commands import costs
from fedsim.study.bench_rows import StageResult
from tools.bench.paper_work import paper_work, written

ROWS = Path(__file__).parents[2] / "tools" / "bench" / "results"
CPU = "intel-r-xeon-r-processor-2-threads"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of docs/results."""
    monkeypatch.setattr(costs, "results_folder", lambda _: tmp_path)
    return tmp_path


def test_the_committed_work_is_what_the_benchmark_counts() -> None:
    assert costs.WORK.read_text(encoding="utf-8") == written(), "run: python -m tools.bench.paper_work"


def test_the_papers_work_at_8b() -> None:
    """By hand: N parameters cost 4N a token in training, 2N in scoring; a row has 110 tokens, a guard's tail 170."""
    work = paper_work()
    body = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert work["local_step"].flops == pytest.approx(16 * (109 * 4 * body + 55 * 4 * 4096 * 128256), rel=0.02)
    assert work["guard_row"].flops == pytest.approx(170 * 2 * body, rel=0.05)
    assert work["tuning_step"].flops == pytest.approx(16 * 363 * 4 * body, rel=0.05)
    assert work["cai_iteration"].flops == pytest.approx(16 * (200 * 4 + (200 + 170) * 6) * body, rel=0.1)
    weights = 3 * 55 / 128 * 2 * (body + 4096 * 128256)  # 128 slots share a pass
    cache = 54 * ((55 + 27) + (140 + 27) + (225 + 27)) * 2 * 32 * 2 * 1024  # each turn's steps read what is before
    assert work["conversation"].num_bytes == pytest.approx(weights + cache, rel=0.02)
    read, written = 55 + 2 * (30 + 1), 3 * 54  # a turn's prompt begins with the last reply's last token
    flops = (read + written) * 2 * body + 3 * 55 * 2 * 4096 * 128256
    assert work["conversation"].flops == pytest.approx(flops, rel=0.02), "what the cache keeps is not read again"
    numbers = 32 * 32 * (4096 + 4096 + 4096 + 1024)
    assert (work["aggregation"].num_bytes, work["correction"].num_bytes) == (28 * numbers, 12 * numbers)


def test_pieces_of_the_committed_rows() -> None:
    stages = costs.committed(ROWS)[CPU]
    measured = costs.read(stages)
    assert set(measured.pieces) == set(costs.PIECES) and measured.device == "CPU" and not measured.projects
    rows = {row.name: row for row in stages["local_step"].rows}
    step = rows["fedsim, fast sums (configs/paper), dropout 0.05"]
    assert step.seconds is not None and measured.pieces["local_step"].seconds == step.seconds.p50
    guard = stages["guard"].rows[0]
    assert measured.pieces["guard_row"].seconds == pytest.approx(60 / guard.figures["rows_per_min"])
    peak = stages["aggregation"].facts["peak"]["bytes_per_s"]
    adding = next(row for row in stages["aggregation"].rows if row.name == "fast sum and FedAvg's step")
    assert adding.floor_s == pytest.approx(paper_work()["aggregation"].num_bytes / peak)
    assert "no GPU" in measured.stamp and stages["guard"].facts["commit"][:10] in measured.stamp


def test_a_gpu_comes_first_and_missing_stages_are_left_out(tmp_path: Path) -> None:
    source = costs.committed(ROWS)[CPU]["guard"]
    for name, device, model in (("a-cpu", "A CPU", "tiny"), ("z-gpu", "NVIDIA H200", "Llama-3.1-8B")):
        facts = {**source.facts, "device": device, "model": model}
        StageResult("guard", facts, [], source.rows).write(tmp_path / name / "guard.json")
    known = costs.committed(tmp_path)
    assert list(known) == ["z-gpu", "a-cpu"]
    gpu, cpu = (costs.read(costs.chosen(name, known)) for name in (None, "a-cpu"))
    assert gpu.projects and gpu.device == "NVIDIA H200" and not cpu.projects
    assert list(gpu.pieces) == ["guard_row"] and gpu.lane_share is None
    with pytest.raises(ConfigError, match="known: z-gpu, a-cpu"):
        costs.chosen("other", known)


def test_terminal_json_and_page(pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = pages / "costs.md"
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"round": 1, "stage": "round", "time/train_s": 7.0}\n')
    file = tmp_path / "costs.json"
    assert costs.main([str(folder), "--rows", CPU, "--json", str(file), "--page"]) == 0
    shown, text = capsys.readouterr().out, page.read_text()
    assert "36 h 40 min (follows from the paper's figures)" in shown and "mine" in shown and "7 s" in shown
    assert text.startswith("# ") and "| seconds of a run | mine |" in text
    for content in (shown, text):
        assert "arithmetic, not measured" in content and "no GPU" in content
    content = json.loads(file.read_text())
    assert content["runs"][0] == ["seconds of a run", "mine"]
    assert content["targets"][0][0]["flops"] == 312e12 and content["measured"]["pieces"]["local_step"]["seconds"] > 0


def test_runs_of_one_name_have_a_column_each(tmp_path: Path) -> None:
    for place in "ab":
        (tmp_path / place / "kite").mkdir(parents=True)
        (tmp_path / place / "kite" / "metrics.jsonl").write_text('{"round": 0, "stage": "round"}\n')
    folders = [tmp_path / place / "kite" for place in "ab"]
    assert list(costs.run_rows(folders)) == ["a/kite", "b/kite"] and list(costs.run_rows(folders[:1])) == ["kite"]
    with pytest.raises(ConfigError, match="is named twice"):
        costs.run_rows([folders[0], folders[0]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "4xB200"], "4xH200"),
        (["--rows", "nowhere"], CPU),
        (["nowhere"], "metrics.jsonl"),
        (["--json", "/nowhere/costs.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert costs.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_outside_a_clone_rows_are_asked_for_and_taken_by_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "repository", lambda: None)
    assert costs.main([]) == 2
    assert "--rows not given, and this fedsim has no committed rows" in capsys.readouterr().err
    assert costs.main(["--rows", str(ROWS / CPU)]) == 0
    assert "no GPU row is committed" in capsys.readouterr().out
