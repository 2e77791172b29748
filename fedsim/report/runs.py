"""A finished run read back from its directory: configuration, rows, manifest and samples of its answers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.base.artefacts import file_digest
from fedsim.base.errors import ConfigError, DataError
from fedsim.base.figures import read_benchmarks
from fedsim.base.json_text import parse_json
from fedsim.config import load_config, to_flat
from fedsim.data.evaluation_sets import load_mt_bench
from fedsim.evaluate.fastchat import read_answers
from fedsim.evaluate.own import DESCRIBED
from fedsim.record.groups import Settings, settings_of, short_names
from fedsim.record.metrics import Row, read_rows
from fedsim.record.timers import top_level_seconds
from fedsim.report.summary import RunFacts, eval_points, facts_from
from fedsim.world import write_mt_bench

ANSWERS = re.compile(r".+-round(\d+)-(pretrained|before_cai|after_cai|global)")


@dataclass(frozen=True)
class Sample:
    """One question's two turns and, by evaluation point, the two answers."""

    category: str
    turns: tuple[str, str]
    answers: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        title: name of the run, or of its folder where runs of the report share a name.
        settings: what decides its figures beside the seed.
        rows: its metric rows, oldest first.
        manifest: its ``manifest.json``.
        samples: answers to the embedded world's questions; none where the questions were others.
    """

    title: str
    settings: Settings
    facts: RunFacts
    rows: Sequence[Row]
    manifest: dict[str, Any]
    samples: Sequence[Sample] = ()

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Everything that its evaluations measured; the same for two runs of the same results."""
        kept = ("round", "point")
        return [
            {name: value for name, value in row.items() if name in kept or name.startswith("eval/")}
            for row in self.rows
            if row["stage"] == "eval"
        ]

    @cached_property
    def points(self) -> dict[str, Row]:
        """The evaluations to compare."""
        return eval_points(self.rows)

    @property
    def final(self) -> Row | None:
        """The last evaluation of what the run ended with."""
        return self.points.get("after_cai", self.points.get("global"))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the directories of several runs; runs of one name are called by their folders.

    Raises:
        ConfigError: a directory is named twice.
        DataError: as of :func:`load_run`.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{folder}: is named twice; name every run once")
    runs = [load_run(folder) for folder in folders]
    if len({run.title for run in runs}) == len(runs):
        return runs
    return [replace(run, title=title) for run, title in zip(runs, short_names(folders), strict=True)]


def load_run(folder: Path) -> Run:
    """Read a run's directory.

    Raises:
        DataError: it is no run's, it is not finished, or a file of it is damaged.
    """
    for name in ("config.yaml", "metrics.jsonl", "manifest.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: holds no {name}; give the directory of a finished run (record.dir/name)")
    config = to_flat(load_config(folder / "config.yaml"))
    rows = read_rows(folder / "metrics.jsonl", allow_torn_end=True)
    done, planned = len({row["round"] for row in rows if row["stage"] == "round"}), config["federation.num_rounds"]
    if done < planned or not (folder / "summary.md").is_file():
        raise DataError(f"{folder}: is not finished ({done} of {planned} rounds); start its command again to go on")
    try:
        manifest = parse_json((folder / "manifest.json").read_text(encoding="utf-8"))
        num_ranks = manifest["started"]["num_ranks"]
        settings = settings_of(config, manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'manifest.json'}: is damaged; restore it") from error
    facts = facts_from(
        config,
        num_ranks=num_ranks,
        total_s=sum(sum(top_level_seconds(row).values()) for row in rows),
        places={},
        notes=summary_notes((folder / "summary.md").read_text(encoding="utf-8")),
        manifest=manifest,
        benchmarks=read_benchmarks(folder) or DESCRIBED,
    )
    samples = _samples(folder, manifest) if facts.mt_bench == "embedded" else []
    return Run(facts.name, settings, facts, rows, manifest, samples)


def summary_notes(summary: str) -> list[str]:
    """The lines under a summary's ``## Notes``."""
    _, _, after = f"\n{summary}".partition("\n## Notes\n")
    return [line[2:] for line in after.partition("\n## ")[0].splitlines() if line.startswith("- ")]


def _samples(folder: Path, manifest: dict[str, Any]) -> list[Sample]:
    """The first question of each category with the last answers of each point; none if the questions have changed."""
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted((folder / "answers" / "mt_bench" / "model_answer").glob("*.jsonl")):
        if named := ANSWERS.fullmatch(path.stem):
            found[named[2]] = max(found.get(named[2], (-1, path)), (int(named[1]), path))
    points = [point for point in ("pretrained", "before_cai", "after_cai", "global") if point in found]
    with tempfile.TemporaryDirectory() as place:
        write_mt_bench(place)
        file = Path(place) / "question.jsonl"
        if not points or file_digest(file) != manifest.get("inputs", {}).get("mt_bench", {}).get("sha256"):
            return []
        questions = load_mt_bench(file)
    answers = {point: read_answers(found[point][1]) for point in points}
    first = {question.category: question for question in reversed(questions)}
    return [
        Sample(
            category,
            (question.turns[0], question.turns[1]),
            {point: given[question.question_id] for point, given in answers.items() if question.question_id in given},
        )
        for category, question in reversed(first.items())
    ]
