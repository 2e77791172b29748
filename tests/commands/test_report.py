"""The report as a browser shows it: every figure renders, nothing overflows a phone, and it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from fedsim.commands.report import main
from fedsim.config import load_config
from fedsim.config.loading import to_nested
from fedsim.report.runs import load_runs

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  images: [...document.images].map(image => image.naturalWidth),
  wide: document.documentElement.scrollWidth}) })</script>"""


def make_run(folder: Path, name: str, *words: str, harmless: float = 90.0) -> Path:
    """A finished run's directory with every section's data, three rounds long."""
    run = folder / name
    run.mkdir()
    config = load_config(None, [f"name={name}", "federation.num_rounds=3", *words])
    (run / "config.yaml").write_text(yaml.safe_dump(to_nested(config)), encoding="utf-8")
    manifest = {"started": {"num_ranks": 2, "utc": "2026-01-02T00:00:00+00:00", "command": "/secret/place/run.py"},
                "versions": {"torch": "2"}, "hardware": {"gpus": []}, "inputs": {}, "models": {}}  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def measured(value: float) -> dict[str, Any]:
        figures: dict[str, Any] = {"eval/mt_bench": 7.5, "eval/mt_bench_low": 7.0, "eval/mt_bench_high": 8.0}
        for figure in ("advbench_harmless", "hhh_accuracy", "xstest_safe_refused"):
            figures[f"eval/{'xstest_safe' if 'xstest' in figure else figure.split('_')[0]}_count"] = 120
            figures |= {f"eval/{figure}": value, f"eval/{figure}_low": value - 3, f"eval/{figure}_high": value + 3}
        return figures

    guard = {
        f"guard/num_{name}": count
        for name, count in zip(("caught", "missed", "false_alarms", "passed"), (20, 10, 30, 40), strict=True)
    }
    rows: list[dict[str, Any]] = [
        {"round": 0, "stage": "filter", "point": "fine-tuned", **guard},
        {"round": 0, "stage": "eval", "point": "pretrained", **measured(97.0)},
    ]
    for number in (1, 2, 3):
        rows.append({"round": number, "stage": "eval", "point": "global", **measured(harmless + 1 - number)})
        rows.append({"round": number, "stage": "round", "client/loss": 1.5, "client/loss_003": 1.4, "client/loss_011":
                     1.6, "time/train_s": 4.0, "time/aggregate_s": 0.5, "parallel/idle_share": 0.1})  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (run / "summary.md").write_text("# Run\n\n## Notes\n\n- a note <b>of its own</b>\n", encoding="utf-8")
    return run


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    runs = [
        make_run(tmp_path, "plain", "guard.kind=none"),
        make_run(tmp_path, "other", "federation.algorithm=scaffold", harmless=80.0),
    ]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown == str(tmp_path / "out" / "report.html")
    return Path(shown)


def browse(page: Path, *options: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@needs_browser
def test_every_figure_renders_and_nothing_overflows_a_phone(page: Path) -> None:
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>"), encoding="utf-8")
    # A window is never narrower than 500 px, so that a frame takes the phone's place.
    frame = page.with_name("frame.html")
    frame.write_text(f'<iframe src="{probed.name}" width=390 height=2000></iframe>', encoding="utf-8")
    shown = browse(probed, "--virtual-time-budget=4000", "--window-size=1200,1200", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"'))
    pictures = len(list(page.parent.glob("*.png")))
    assert len(found["images"]) == pictures > 8 and all(width > 300 for width in found["images"])
    assert found["wide"] <= 1200
    inner = "document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    script = f"<script>addEventListener('load', () => {{ document.title = {inner} }})</script>"
    frame.write_text(script + frame.read_text(encoding="utf-8"), encoding="utf-8")
    shown = browse(frame, "--virtual-time-budget=4000", "--allow-file-access-from-files", "--dump-dom")
    wide = re.search(r"<title>(\d+)</title>", shown)
    assert wide is not None and int(wide[1]) <= 390


@needs_browser
def test_it_can_be_looked_at_and_printed(page: Path) -> None:
    shot, printed = page.with_name("shot.png"), page.with_name("page.pdf")
    browse(page, "--window-size=500,3000", f"--screenshot={shot}")
    picture = imread(shot)
    assert picture.shape[:2] == (3000, 500) and picture[..., :3].std() > 0.05
    browse(page, f"--print-to-pdf={printed}")
    assert printed.read_bytes().startswith(b"%PDF") and printed.stat().st_size > 20_000


def test_the_page_stands_alone_and_says_what_the_runs_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert "AdvBench: harmless replies, %, FedAvg: FL 88.0 (pretrained 97.0)" in text
    assert "a note &lt;b&gt;of its own&lt;/b&gt;" in text and "/secret/place" not in text and "run.py" in text
    assert "20 (66.7 %)" in text and "10 (33.3 %)" in text and "30 (42.9 %)" in text
    for heading in ("Loss by client", "Guard", "Time by phase", "Idle share", "Cost against safety", "Manifests"):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Sample answers</h2>" not in text, "there are none"
    assert "AdvBench: harmless replies, %, before CAI and at the end, 2 arm(s), 2 runs, 120 items; bars" in text
    alts = re.findall(r'alt="([^"]*)"', text)
    assert len(alts) == len(set(alts)) > 8 and all(re.search(r"\d", alt) for alt in alts), "each says what it shows"


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed under two folders with other results: two lines in every picture, and a warning that names both."""
    for place in "ab":
        (tmp_path / place).mkdir()
    runs = [make_run(tmp_path / place, "kite", harmless=value) for place, value in (("a", 90.0), ("b", 70.0))]
    assert [run.title for run in load_runs(runs)] == ["a/kite", "b/kite"]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "a/kite and b/kite are FedAvg, FL with seed 0, but their results differ" in page
    assert "a/kite (seed 0), b/kite (seed 0)" in page and str(tmp_path) not in page
    assert main([str(runs[0]), str(runs[0]), "--out", str(tmp_path / "out")]) == 2
    assert "is named twice; name every run once" in capsys.readouterr().err


@pytest.mark.parametrize(("damage", "message"), [
    (lambda run: shutil.rmtree(run), "holds no config.yaml"),
    (lambda run: (run / "summary.md").unlink(), r"is not finished \(3 of 3 rounds\)"),
    (lambda run: (run / "manifest.json").write_text("{"), "manifest.json: is damaged"),
    (lambda run: (run / "manifest.json").write_text('{"inputs": {}, "models": {}}'), "has no started.num_ranks"),
    (lambda run: os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 9),
     r"is not finished \(2 of 3 rounds\)"),
])  # fmt: skip
def test_what_is_no_finished_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    run = make_run(tmp_path, "broken")
    damage(run)
    assert main([str(run), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told) and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
