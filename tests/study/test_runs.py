"""The runs of a study: what is started, when, what is left alone, and what a failure does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError, RunError
from fedsim.config import load_config, to_flat
from fedsim.study.command import ENTRY as ENTRY_WORDS
from fedsim.study.runs import Cell, Launch, run_cells

# Stands for `fedsim run`: takes the same words and leaves what a finished run leaves; its name says how it behaves.
ENTRY = """
import json, sys, time
from pathlib import Path
import yaml
from fedsim.config import load_config
from fedsim.config.loading import to_nested
began = time.time()
config = load_config(Path(sys.argv[1]), sys.argv[2:])
folder = Path(config.record.dir) / config.name
folder.mkdir(parents=True, exist_ok=True)
time.sleep(60 if "hang" in config.name else 0.1)
if "fail" in config.name and not (folder.parent / "mended").exists():
    print("error: the cellar is flooded; pump it out", file=sys.stderr)
    sys.exit(2)
(folder / "config.yaml").write_text(yaml.safe_dump(to_nested(config)))
(folder / "times.json").write_text(json.dumps([began, time.time()]))
(folder / "summary.md").write_text("done")
"""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    entry, config = tmp_path / "entry.py", tmp_path / "base.yaml"
    entry.write_text(ENTRY, encoding="utf-8")
    config.write_text("federation: {num_rounds: 3}\n", encoding="utf-8")
    return Launch("trial", config, [f"record.dir={tmp_path / 'runs'}", "wandb.tags=[mine]"], 1, 2, [str(entry)])


def times(folder: Path) -> tuple[float, float]:
    began, ended = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    return began, ended


def test_every_cell_runs_once_with_its_settings(launch: Launch) -> None:
    cells = [Cell(f"c{seed}", seed, {"arm": "A", "x": ""}, {"cai.iterations": 2}) for seed in (0, 1)]
    said: list[str] = []
    folders = run_cells(cells, launch, said.append)
    for cell in cells:
        config = load_config(folders[cell.name] / "config.yaml")
        assert (config.seed, config.cai.iterations, config.federation.num_rounds) == (cell.seed, 2, 3)
        assert config.wandb.group.startswith("trial · A · ")
        assert config.wandb.tags == ["mine", "trial", f"seed-{cell.seed}"]
        assert folders[cell.name].parent == launch.folder
    assert sum("finished in" in line for line in said) == 2
    before = {name: (folder / "times.json").stat().st_mtime_ns for name, folder in folders.items()}
    said.clear()
    assert run_cells(cells, launch, said.append) == folders and said == ["2 of 2 runs are finished already"]
    assert before == {name: (folder / "times.json").stat().st_mtime_ns for name, folder in folders.items()}


def test_only_seeds_of_one_configuration_share_a_group(launch: Launch) -> None:
    cells = [Cell(f"c{seed}", seed, {"arm": "A"}, {"cai.iterations": 2}) for seed in (0, 1)]
    groups = [launch.resolved(cell).wandb.group for cell in cells]
    again = replace(launch, overrides=[*launch.overrides, "local.lr=0.001"])
    elsewhere = replace(launch, overrides=[*launch.overrides, "record.dir=other", "parallel.exact=false"])
    assert groups[0] == groups[1] == elsewhere.resolved(cells[0]).wandb.group
    assert again.resolved(cells[0]).wandb.group not in groups
    named = replace(launch, overrides=[*launch.overrides, "wandb.group=mine"])
    assert named.resolved(cells[0]).wandb.group == "mine"


def test_a_finished_run_of_another_configuration_is_not_taken(launch: Launch) -> None:
    run_cells([Cell("c", 0, {}, {"cai.iterations": 2})], launch, print)
    with pytest.raises(ConfigError, match=r"cai\.iterations was 2, is 4.*another directory"):
        run_cells([Cell("c", 0, {}, {"cai.iterations": 4})], launch, print)


def test_a_seeds_first_cell_runs_alone_among_its_seed_and_no_more_than_asked_at_once(launch: Launch) -> None:
    cells = [Cell(f"{arm}{seed}", seed, {"arm": arm}) for arm in "abc" for seed in (0, 1)]
    folders = run_cells(cells, launch, lambda text: None)
    spans = {cell.name: times(folders[cell.name]) for cell in cells}
    for seed in (0, 1):
        assert all(spans[f"{arm}{seed}"][0] > spans[f"a{seed}"][1] for arm in "bc")
    for began, _ in spans.values():
        assert sum(start <= began < end for start, end in spans.values()) <= 2


def test_a_failed_cell_is_told_and_done_again(launch: Launch) -> None:
    cells = [Cell("fail", 0, {}), Cell("well", 0, {}), Cell("good", 1, {})]
    with pytest.raises(RunError, match=r"1 of 3 runs failed \(fail: error: the cellar is flooded; pump it out\)"):
        run_cells(cells, launch, lambda text: None)
    assert (launch.folder / "well" / "summary.md").exists() and (launch.folder / "good" / "summary.md").exists()
    (launch.folder / "mended").touch()
    said: list[str] = []
    run_cells(cells, launch, said.append)
    assert said[0] == "2 of 3 runs are finished already" and "1/1 fail: finished" in said[1]


@pytest.mark.parametrize(
    "ending",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.deep) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_study_that_is_ended_leaves_no_run_behind(launch: Launch, tmp_path: Path, ending: signal.Signals) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        "import signal\nfrom pathlib import Path\nfrom fedsim.study.runs import *\n"
        "for number, act in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):\n"
        "    signal.signal(number, act)  # a shell's background jobs ignore the one, nohup the other\n"
        f"launch = Launch('trial', Path({str(launch.config)!r}), {list(launch.overrides)!r}, 1, 2, "
        f"{list(launch.entry)!r})\n"
        "run_cells([Cell('hang0', 0, {}), Cell('hang1', 1, {})], launch, print)\n",
        encoding="utf-8",
    )
    root = str(Path(__file__).parents[2])
    study = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while len(list(launch.folder.glob("hang*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    study.send_signal(ending)
    assert study.wait(timeout=30) != 0
    listed = subprocess.run(["pgrep", "-f", launch.entry[0]], capture_output=True, text=True, check=False).stdout
    assert listed.split() == []


def test_a_run_is_started_as_a_user_would(launch: Launch) -> None:
    """By the module, so that a study works from an installed wheel."""
    cell = Cell("c", 0, {})
    one = replace(launch, entry=ENTRY_WORDS)
    assert one.command(cell)[:4] == [sys.executable, "-m", "fedsim", "run"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    wanted = [sys.executable, *torchrun, "-m", "fedsim", "run", str(launch.config), *launch.words(cell)]
    assert replace(one, num_processes=3).command(cell) == wanted


TEXTS = st.one_of(
    st.sampled_from(["010", "yes", "", "1e3", "a b", "x: y", "[q]", "2026-01-02", "null", "#1"]),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12),
)


@settings(deadline=None, max_examples=40)
@given(
    TEXTS,
    st.lists(st.text("abz_-01 ", min_size=1).filter(str.strip), min_size=1, max_size=3),
    st.floats(1e-9, 1e9),
    st.booleans(),
)
def test_words_give_back_the_very_values(text: str, names: list[str], number: float, flag: bool) -> None:
    keys = {"guard.refusal": text, "model.lora_targets": names, "local.max_grad_norm": number, "data.fit": flag}
    launch = Launch("s", Path(__file__).parents[2] / "configs" / "demo.yaml", [], 1, 1, ["x"])
    found = to_flat(launch.resolved(Cell("c", 0, {}, keys)))
    assert {key: found[key] for key in keys} == keys
