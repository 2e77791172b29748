"""The benchmarks that a run's configuration asks for, and the texts that they leave behind."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.artefacts import ArtefactStore, write_json
from fedsim.config import EvalConfig
from fedsim.config.measuring import is_embedded
from fedsim.data.prepare import embedded_file
from fedsim.errors import Gathered
from fedsim.evaluate.benchmark import OwnBenchmark
from fedsim.evaluate.fastchat import write_answers
from fedsim.evaluate.own import OWN
from fedsim.evaluate.suite import Evaluation, Part, Suite
from fedsim.record.items import write_items


def load_suite(settings: EvalConfig, store: ArtefactStore, *, judged: bool = False) -> tuple[Suite, dict[str, Path]]:
    """Read every benchmark, and say which files they came from (by benchmark name).

    The embedded world's grammar and rubric come with its own benchmarks only. A guard is not loaded here.

    Args:
        judged: a language model rates MT-Bench's answers.

    Raises:
        ConfigError: a user's phrase rule cannot be loaded.
        DataError: a missing or malformed file.
        Problems: several.
    """
    mistakes = Gathered()
    parts: list[Part] = []
    files: dict[str, Path] = {}
    for name, kind in OWN.items():
        value = getattr(settings, name)
        if not value:
            continue
        files[name] = _file(kind, value, store)
        part = mistakes.attempt(lambda: _part(kind, settings, files[name], judged))  # noqa: B023
        if part is not None:
            parts.append(part)
    mistakes.raise_all()
    return Suite(parts, limit=settings.limit), files


def _part(kind: type[OwnBenchmark], settings: EvalConfig, file: Path, judged: bool) -> Part:
    benchmark = kind.from_config(settings, judged=judged)
    return Part(benchmark, benchmark.load(file))


def _file(kind: type[OwnBenchmark], value: str, store: ArtefactStore) -> Path:
    """The file that ``eval.<name>`` names; one of the embedded world is written first."""
    if not is_embedded(f"eval.{kind.name}", value):
        return Path(os.path.expanduser(value))
    embedded = kind.embedded[value]
    return embedded_file(store, embedded.artefact, embedded.name, embedded.write)


def write_texts(found: Evaluation, suite: Suite, folder: Path, model_id: str, *, attacks: bool) -> None:
    """Write what the model said, on rank 0: answers that a judge may read (harmless questions) as FastChat's files.

    Args:
        suite: what was asked.
        folder: made where there is something to write.
        model_id: names the model and the point in FastChat's files.
        attacks: also write all other free replies (``record.texts``), such as those to attacks, each with its item's
            place in the file, counted from 0; they go nowhere else.
    """
    if found.answers:
        write_answers(folder / "mt_bench", found.answers, model_id, tstamp=time.time())
    if not attacks:
        return
    for part in suite.parts:
        result = found.results.get(part.benchmark.name)
        if result is None or not result.replies or result.answers:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        places = part.places(suite.limit)
        texts = [reply.text for reply in result.replies]
        write_json(folder / f"{part.benchmark.name}-{model_id}.json", _placed(texts, places))


def _placed(texts: Sequence[str], places: Sequence[int]) -> list[dict[str, Any]]:
    """Replies with the place of their item; without it where items and replies do not match."""
    if len(texts) % len(places):
        return [{"reply": text} for text in texts]
    return [{"item": places[i % len(places)], "reply": text} for i, text in enumerate(texts)]


def write_outcomes(found: Evaluation, path: Path) -> None:
    """Write the items behind the figures (:attr:`Evaluation.items`) on rank 0; nothing where there are none.

    Scores of a local or remote judge are not among them; they stand beside the answers.

    Args:
        path: of the file; its folder is made.
    """
    if found.items:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_items(path, found.items)
