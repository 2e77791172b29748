"""The studies' commands from the command line on: runs, files, pages and what they refuse; the runs are pretended."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fedsim.commands import sweep, table1, table2
from fedsim.study import command
from fedsim.study.seed_rows import read_seed_rows
from tests.study.conftest import MANIFEST

ROOT = Path(__file__).parents[2]

# Stands for `fedsim run`: leaves what a finished run leaves, with figures that follow from its configuration.
ENTRY = f"""
import json, sys
from pathlib import Path
import yaml
from fedsim.config import load_config
from fedsim.config.loading import to_nested
from fedsim.record.outcomes import item_file, write_items
config = load_config(Path(sys.argv[1]), sys.argv[2:])
folder = Path(config.record.dir) / config.name
(folder / "items").mkdir(parents=True)
(folder / "config.yaml").write_text(yaml.safe_dump(to_nested(config)))
(folder / "manifest.json").write_text({json.dumps(MANIFEST)!r})
last = config.federation.num_rounds
counts = dict(zip(("caught", "false_alarms", "missed", "passed"), (20, 10, 10 + config.seed, 60)))
guard = {{f"guard/num_{{k}}": v for k, v in counts.items()}}
rows = [{{"round": 0, "stage": "guard", "point": "fine-tuned", **guard}}]
quality = 3 * (config.guard.kind != "none") + min(config.cai.iterations, 6)
final = "after_cai" if config.cai.iterations else "global"
figures = ("advbench_harmless_" + config.eval.advbench_phrases.replace("-", "_"), "hhh_" + config.eval.hhh_scorer)
for number, point, right in ((0, "pretrained", 10), (last, final, quality)):
    rows.append({{"round": number, "stage": "eval", "point": point}})
    flags = [float(i < right) for i in range(10)]
    write_items(item_file(folder, number, point), {{f: dict(enumerate(flags)) for f in (*figures, "mt_bench")}})
rows.append({{"round": last, "stage": "round", "time/train_s": 60, "time/cai_s": 30}})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "summary.md").write_text("done")
"""

Shown = Callable[[], str]


@pytest.fixture(autouse=True)
def _pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY, encoding="utf-8")
    monkeypatch.setattr(command, "ENTRY", (str(entry),))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of docs/results that the commands may write."""
    place = tmp_path / "pages"
    shutil.copytree(ROOT / "docs" / "results", place / "docs" / "results")
    monkeypatch.setattr(command, "repository", lambda: place)
    return place / "docs" / "results"


@pytest.mark.deep
def test_both_tables_from_the_same_runs(tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"record.dir={tmp_path / 'runs'}", "--seeds", "3-4", "--jobs", "2", "--publish"]
    assert table1.main(words) == 0
    shown, told = capsys.readouterr()
    assert "16/16 " in told and "FedAvg: (FL + CAI) − FL" in shown
    assert table2.main(words) == 0
    shown, told = capsys.readouterr()
    assert "2 of 2 runs are finished already" in told and "guard, fine-tuned" in shown
    folder = tmp_path / "runs" / "table1"
    found = {(r.aggregation, r.method, r.figure, r.seed): r.value for r in read_seed_rows(folder / "table1.csv")}
    assert found["scaffold", "FL + CAI", "advbench_harmless", 3] == 60.0, "six right of ten"
    assert found["fedavg", "FL + filter + CAI", "hhh_likelihood", 4] == 90.0
    for name in ("table1", "table2"):
        page = (results / f"{name}.md").read_text(encoding="utf-8")
        assert f"Made by `fedsim {name} --seeds 3-4 --jobs 2`." in page and str(tmp_path) not in page
    assert str(tmp_path) not in (results / "measured.json").read_text(encoding="utf-8")
    for name in ("table1.csv", "table2.csv"):
        assert (results / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("tool", [table1, table2], ids=["table1", "table2"])
def test_a_page_alone_is_made_from_the_committed_rows(results: Path, tool: ModuleType) -> None:
    """No run is started, and a wrong page is put right."""
    page = results / tool.PAGE
    right = page.read_text(encoding="utf-8")
    page.write_text("99.9", encoding="utf-8")
    assert tool.main(["--page"]) == 0
    assert page.read_text(encoding="utf-8") == right


def test_a_sweep_writes_its_finding_and_its_page(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text("eval: {advbench_phrases: gcg}\n", encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{what: a question, about: Some words., config: base.yaml, x: cai.iterations, figures: [mt_bench], quick: "
        "{seeds: 0-1, "
        "settings: {guard.kind: none, eval.xstest: ''}, grids: [{cai.iterations: [2, 4]}], findings: [{figure: "
        "mt_bench, treated: {cai.iterations: 4}, control: {cai.iterations: 2}}]}}",
        encoding="utf-8",
    )
    words = [str(file), f"record.dir={tmp_path / 'runs'}", "eval.helpful=", "federation.num_rounds=1", "--publish"]
    assert sweep.main(words) == 0
    shown, _ = capsys.readouterr()
    finding = "MT-Bench"
    folder = tmp_path / "runs" / "sweep-mine-quick"
    assert finding in shown and finding in (folder / "finding.md").read_text(encoding="utf-8")
    page = (results / "sweep-mine.md").read_text(encoding="utf-8")
    assert page.startswith("# Sweep: a question\n\nSome words.\n\n")
    assert "Made by `fedsim sweep '…/mine.yaml' eval.helpful= federation.num_rounds=1`" in page
    assert str(tmp_path) not in page
    assert (results / "sweep-mine.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "iterations-2-s0" / "config.yaml").read_text(encoding="utf-8").count("xstest: ''") == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=3", r"seed=3: every run of .* has its own seed; give --seeds"),
        ("name=x", r"name=x: every run of .* has its own name; leave it out"),
        ("federation.algorithm=fedavg", r"has its own federation.algorithm; leave it out"),
        ("--jobs=0", r"--jobs 0: must be at least 1"),
        ("--seeds=2-1", r"must go upwards"),
    ],
)
def test_what_a_table_varies_cannot_be_set(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table1.main([word]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(message, told)


def test_a_sweeps_own_keys_cannot_be_set_but_its_settings_can(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "sweeps" / "filter-threshold.yaml")
    assert sweep.main([path, "guard.threshold=0.5"]) == 2
    assert "guard.threshold=0.5: every run of sweep-filter-threshold-quick has its own" in capsys.readouterr().err
    args, grid = sweep.parse_args([path, "eval.xstest=embedded"])
    launch = command.launch_of(args, "s", grid.config, grid.settings)
    assert launch.resolved(grid.cells([0])[0]).eval.xstest == "embedded"
