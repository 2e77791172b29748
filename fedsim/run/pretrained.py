"""The pretrained model's evaluation as an artefact, shared by runs that measure the same thing.

Every arm begins with the same pretrained model, so its figures need not be computed again before an
arm's first step. The artefact holds figures, the items behind them and MT-Bench answers; replies to
attacks are in it as little as anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from fedsim.base.artefacts import ArtefactStore, write_json
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.mt_bench import MtAnswer
from fedsim.evaluate.suite import Evaluation, Suite
from fedsim.generate.engine import Reply

VERSION: Final = 1
"""Of the pretrained model's evaluations (:mod:`fedsim.base.artefacts`)."""

_FILE = "evaluation.json"


def shared_evaluation(
    store: ArtefactStore,
    depends: Mapping[str, Any],
    suite: Suite,
    compute: Callable[[], Evaluation],
) -> Evaluation:
    """Compute the evaluation of these dependencies, or read it from an earlier run's artefact.

    Args:
        depends: everything beside the code that decides the figures: model, benchmarks, settings,
            machine.
        suite: the benchmarks.
        compute: measures; called on every rank where the artefact is not there.

    Returns:
        The evaluation, without the replies to attacks where it was read.
    """
    computed: list[Evaluation] = []

    def build() -> Evaluation:
        computed.append(compute())
        return computed[0]

    artefact = store.get("pretrained-evaluation", depends, VERSION, build, _write)
    if computed:
        found = computed[0]
    else:
        mt_bench = suite.part("mt_bench")
        questions = [] if mt_bench is None else mt_bench.chosen(suite.limit)
        found = _read(artefact.folder, questions)
    return replace(found, artefact=artefact.folder.name, reused=artefact.reused)


def _write(folder: Path, found: Evaluation) -> None:
    answers = []
    for answer in found.answers:
        replies = [asdict(reply) for reply in answer.replies]
        answers.append({"replies": replies, "scores": answer.scores})
    # Lists of pairs, as JSON writers may sort the keys of objects.
    items = [[figure, list(values.items())] for figure, values in found.items.items()]
    metrics = list(found.metrics.items())
    write_json(folder / _FILE, {"metrics": metrics, "items": items, "answers": answers})


def _read(folder: Path, questions: Sequence[MtQuestion]) -> Evaluation:
    """The evaluation without the results of its benchmarks.

    Args:
        questions: that were answered.
    """
    content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    answers = []
    for question, entry in zip(questions, content["answers"], strict=True):
        first, second = (Reply(**reply) for reply in entry["replies"])
        answers.append(
            MtAnswer(question, (first, second), (entry["scores"][0], entry["scores"][1])),
        )
    items = {figure: dict(values) for figure, values in content["items"]}
    return Evaluation(dict(content["metrics"]), items, answers)
