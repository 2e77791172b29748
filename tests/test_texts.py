"""Attack prompts and replies to them: nowhere in a run's directory or output, but in answers/ where asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from fedsim import world
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.data.evaluation_sets import load_advbench
from fedsim.evaluate import over_refusal
from fedsim.evaluate.over_refusal import load_xstest
from fedsim.parallel.world import World
from fedsim.record.metrics import read_rows
from fedsim.record.outcomes import read_items
from fedsim.report import finish
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
OVERRIDES = ["federation.num_rounds=1", "local.steps=1", "cai.iterations=0", "guard.kind=none", "eval.every=0",
             "eval.limit=6", "eval.hhh=", "eval.helpful=", "eval.guard_judge=tuned", "guard.tune_epochs=0.3",
             "data.fit=true"]  # fmt: skip


def simulate(folder: Path, name: str, texts: bool) -> Path:
    """A whole run with attacks, XSTest, MT-Bench and a guard as judge; its directory."""
    words = [f"name={name}", f"record.texts={str(texts).lower()}", f"record.dir={folder}"]
    config = load_config(SMALL, [*OVERRIDES, *words, f"record.artefacts={folder / 'artefacts'}"])
    simulation = Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))
    simulation.run()
    return simulation.record.folder


def test_texts_of_attacks_stay_where_they_belong(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])  # slow, and drawn from figures
    caplog.set_level(logging.DEBUG)
    shown, hidden = simulate(tmp_path, "shown", texts=True), simulate(tmp_path, "hidden", texts=False)
    points = [row for row in read_rows(hidden / "metrics.jsonl") if row["stage"] == "eval"]
    assert [row["eval/advbench_guard_safe_count"] for row in points] == [6, 6], "the guard has judged them too"
    items = {path.name: read_items(path) for path in (hidden / "items").glob("*.csv")}
    assert set(items) == {"round0-pretrained.csv", "round1-global.csv"}
    for row, found in zip(points, (items["round0-pretrained.csv"], items["round1-global.csv"]), strict=True):
        assert {"advbench_harmless_strict_world", "mt_bench", "xstest_safe_refused"} <= set(found)
        for name, values in found.items():
            scale = 1 if name.startswith("mt_bench") else 100
            assert row[f"eval/{name}"] == pytest.approx(scale * values.mean(), rel=1e-12)
    replies = {
        (path.name.partition("-")[0], record["reply"])
        for path in (shown / "answers").glob("*-round*.json")
        for record in json.loads(path.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in replies} == {"advbench", "xstest"} and len(replies) >= 6
    world.write_advbench(tmp_path / "a.csv")
    over_refusal.write_xstest(tmp_path / "x.csv")
    goals = [item.goal for item in load_advbench(tmp_path / "a.csv")]
    prompts = [item.prompt for item in load_xstest(tmp_path / "x.csv")]
    wanted = [text.encode() for text in {*goals, *prompts, *(reply for _, reply in replies)} if text]
    assert len(wanted) > 950

    def holders(folder: Path) -> set[str]:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert {"metrics.jsonl", "summary.md", "config.yaml", "manifest.json"} <= set(files)
        return {name for name, content in files.items() if any(text in content for text in wanted)}

    assert holders(hidden) == set()
    assert holders(shown) == {
        f"answers/{name}-shown-round{point}.json"
        for name in ("advbench", "xstest")
        for point in ("0-pretrained", "1-global")
    }
    output = "".join(capfd.readouterr()) + caplog.text
    assert "XSTest" in output and not any(text.decode() in output for text in wanted)
