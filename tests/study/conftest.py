"""Run directories as finished runs leave them, made by hand in a moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.config import load_config
from fedsim.config.loading import to_nested
from fedsim.record.outcomes import item_file, write_items
from fedsim.report.finished import FinishedRun

MANIFEST = {
    "started": {"utc": "2026-01-02T03:04:05+00:00", "command": "x", "num_ranks": 1},
    "versions": {"torch": "1", "transformers": "2", "peft": "3", "fedsim": "4"},
    "hardware": {"cores": 2, "cpu": "a CPU", "gpus": []},
    "git": {"commit": "0123456789abcdef", "modified": False},
    "inputs": {},
    "models": {},
}

Finish = Callable[..., FinishedRun]


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """Makes a finished run: ``finish(name, ["key=value"], {"point": {"figure": [outcomes]}}, guard={...})``."""

    def make(
        name: str,
        words: list[str],
        items: Mapping[str, Mapping[str, list[float]]],
        rows: list[dict[str, Any]] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> FinishedRun:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = load_config(None, [*words, f"name={name}", f"record.dir={tmp_path}"])
        (folder / "config.yaml").write_text(yaml.safe_dump(to_nested(config)), encoding="utf-8")
        (folder / "manifest.json").write_text(
            json.dumps({**MANIFEST, "inputs": {role: {"sha256": digest} for role, digest in (inputs or {}).items()}}),
            encoding="utf-8",
        )
        lines = [*(rows or [])]
        lines += [{"round": number, "stage": "round"} for number in range(1, config.federation.num_rounds)]
        for point, figures in items.items():
            number = 0 if point == "pretrained" else config.federation.num_rounds
            lines.append({"round": number, "stage": "eval", "point": point})
            path = item_file(folder, number, point)
            path.parent.mkdir(exist_ok=True)
            write_items(path, {figure: dict(enumerate(values)) for figure, values in figures.items()})
        lines.append({"round": config.federation.num_rounds, "stage": "round", "time/train_s": 60, "time/cai_s": 30})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        (folder / "summary.md").write_text("done", encoding="utf-8")
        return FinishedRun.read(folder)

    return make
