"""Runs of the report's page: finished runs with titles and samples of their answers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsim.base.artefacts import file_digest
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench
from fedsim.evaluate.fastchat import read_answers
from fedsim.record.groups import short_names
from fedsim.report.finished import FinishedRun
from fedsim.report.sections import POINT_TITLES
from fedsim.world import write_mt_bench

ANSWERS = re.compile(r".+-round(?P<round>\d+)-(?P<point>pretrained|before_cai|after_cai|global)")
"""Name of a file of answers, without its ending."""


@dataclass(frozen=True)
class Sample:
    """One question's two turns and, by evaluation point, the two answers."""

    category: str
    turns: tuple[str, str]
    answers: dict[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Run(FinishedRun):
    """A finished run as the page shows it.

    Attributes:
        title: name of the run, or of its folder where runs of the report share a name.
        samples: answers to the embedded world's questions; none where the questions were others.
    """

    title: str = ""
    samples: Sequence[Sample] = ()


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the directories of several runs; runs of one name are called by their folders.

    Raises:
        ConfigError: a directory is named twice.
        DataError, CheckpointError: as of :meth:`FinishedRun.read`.
    """
    places = short_names(folders)
    runs = [load_run(folder) for folder in folders]
    if len({run.title for run in runs}) == len(runs):
        return runs
    return [replace(run, title=place) for run, place in zip(runs, places, strict=True)]


def load_run(folder: Path) -> Run:
    """Read a run's directory, with samples if it answered the embedded world's questions.

    Raises:
        DataError, CheckpointError, ConfigError: as of :meth:`FinishedRun.read`.
    """
    run = Run.read(folder)
    samples: list[Sample] = []
    if run.facts.mt_bench == "embedded":
        samples = _samples(run)
    return replace(run, title=run.facts.name, samples=samples)


def _samples(run: Run) -> list[Sample]:
    """Return the first question of each category with the last answers of each evaluation point.

    Returns:
        Samples in the order of the questions; none if the questions have changed since.
    """
    files = _answer_files(run.folder)
    if not files:
        return []
    questions = _embedded_questions(run)
    if not questions:
        return []
    # Evaluation point → question id → answers to both turns.
    answers = {point: read_answers(path) for point, path in files.items()}

    samples: dict[str, Sample] = {}  # by category
    for question in questions:
        if question.category in samples:
            continue
        given = {}
        for point, by_question in answers.items():
            if question.question_id in by_question:
                given[point] = by_question[question.question_id]
        turns = (question.turns[0], question.turns[1])
        samples[question.category] = Sample(question.category, turns, given)
    return list(samples.values())


def _answer_files(folder: Path) -> dict[str, Path]:
    """Return the newest file of answers by evaluation point, in the order of the points."""
    # Evaluation point → round of its newest file, and the file.
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((folder / "answers" / "mt_bench" / "model_answer").glob("*.jsonl")):
        named = ANSWERS.fullmatch(path.stem)
        if named is not None:
            entry = (int(named["round"]), path)
            newest[named["point"]] = max(newest.get(named["point"], entry), entry)
    return {point: newest[point][1] for point in POINT_TITLES if point in newest}


def _embedded_questions(run: Run) -> Sequence[MtQuestion]:
    """Return the embedded world's questions; none if the run answered others, by their SHA-256."""
    known = run.manifest["inputs"].get("mt_bench", {}).get("sha256")
    with tempfile.TemporaryDirectory() as place:
        write_mt_bench(place)
        file = Path(place) / "question.jsonl"
        if file_digest(file) != known:
            return []
        return load_mt_bench(file)
