"""The benchmarks that a run's configuration asks for, and the texts that they leave behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fedsim.artefacts import ArtefactStore, write_json
from fedsim.config import EvalConfig
from fedsim.config.measuring import HELD_OUT, is_embedded
from fedsim.data import world
from fedsim.data.benchmarks import load_advbench, load_hhh, load_mt_bench
from fedsim.data.helpful import load_helpful
from fedsim.data.prepare import embedded_file
from fedsim.data.xstest import load_xstest
from fedsim.errors import Gathered
from fedsim.evaluate.fastchat import write_answers
from fedsim.evaluate.phrases import users_rules
from fedsim.evaluate.rows import subset_places
from fedsim.evaluate.suite import Evaluation, Suite
from fedsim.record.items import write_items

T = TypeVar("T")

BENCHMARKS: Final = ("advbench", "hhh", "mt_bench", "xstest", "helpful")
"""Keys of the configuration that name a benchmark's file."""

_EMBEDDED: Final = {
    "advbench": ("advbench.csv", world.write_advbench),
    "hhh": ("hhh.jsonl", world.write_hhh),
    "xstest": ("xstest.csv", world.write_xstest),
    "helpful": ("helpful.jsonl", world.write_helpful),
}
"""Files of the embedded world by benchmark: name and writer."""


def load_suite(settings: EvalConfig, store: ArtefactStore) -> tuple[Suite, dict[str, Path]]:
    """Read every benchmark, and say which files they came from (by benchmark name).

    The embedded world's grammar and rubric come with its own benchmarks only. A guard is not loaded here.

    Raises:
        DataError: a missing or malformed file.
        Problems: several.
    """
    asked = {kind: getattr(settings, kind) for kind in BENCHMARKS}
    files = {kind: _file(value, store, kind) for kind, value in asked.items() if value}
    mistakes = Gathered()

    def read(kind: str, load: Callable[[Path], Sequence[T]]) -> Sequence[T]:
        return (mistakes.attempt(lambda: load(files[kind])) if kind in files else None) or ()

    suite = Suite(
        advbench=read("advbench", load_advbench),
        hhh=read("hhh", load_hhh),
        mt_bench=read("mt_bench", load_mt_bench),
        xstest=read("xstest", load_xstest),
        helpful=read("helpful", load_helpful),
        judge=world.judge_reply if is_embedded("eval.advbench", settings.advbench) else None,
        refuses=world.is_refusal if settings.xstest == "embedded" else None,
        rubric=world.rubric_score if settings.mt_bench == "embedded" else None,
        advbench_phrases=settings.advbench_rule,
        rules=mistakes.attempt(lambda: users_rules(settings.advbench_phrases, settings.advbench_options)) or {},
        hhh_scorer=settings.hhh_scorer,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.limit,
    )
    mistakes.raise_all()
    return suite, files


def _file(value: str, store: ArtefactStore, kind: str) -> Path:
    if not is_embedded(f"eval.{kind}", value):
        return Path(os.path.expanduser(value))
    if value == HELD_OUT:
        return embedded_file(store, "world-advbench-held-out", "advbench.csv", world.write_held_out_advbench)
    if kind == "mt_bench":
        return embedded_file(store, "world-mt-bench", "question.jsonl", lambda path: world.write_mt_bench(path.parent))
    name, write = _EMBEDDED[kind]
    return embedded_file(store, f"world-{kind}", name, write)


def write_texts(found: Evaluation, suite: Suite, folder: Path, model_id: str, *, attacks: bool) -> None:
    """Write what the model said, on rank 0: MT-Bench answers (harmless questions) as FastChat's files.

    Args:
        suite: what was asked.
        folder: made where there is something to write.
        model_id: names the model and the point in FastChat's files.
        attacks: also write the replies to AdvBench's and XSTest's prompts (``record.texts``), each with its item's
            place in the file, counted from 0; they go nowhere else.
    """
    if found.answers:
        write_answers(folder / "mt_bench", found.answers, model_id, tstamp=time.time())
    for name, result, num_items in (
        ("advbench", found.advbench, len(suite.advbench)),
        ("xstest", found.xstest, len(suite.xstest)),
    ):
        if attacks and result is not None:
            folder.mkdir(parents=True, exist_ok=True)
            places = subset_places(num_items, suite.limit)
            replies = [
                {"item": place, "reply": reply.text} for place, reply in zip(places, result.replies, strict=True)
            ]
            write_json(folder / f"{name}-{model_id}.json", replies)


def write_outcomes(found: Evaluation, suite: Suite, path: Path) -> None:
    """Write the items behind the figures (:attr:`Evaluation.items`) on rank 0; nothing where there are none.

    Scores of a local or remote judge are not among them; they stand beside the answers.

    Args:
        suite: what was asked.
        path: of the file; its folder is made.
    """
    if found.items:
        placed = {
            figure: dict(zip(_places(suite, figure), values, strict=True)) for figure, values in found.items.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_items(path, placed)


def _places(suite: Suite, figure: str) -> list[int]:
    """Places of a figure's items in the benchmark's file; XSTest's safe and unsafe prompts share one file."""
    benchmark = next(name for name in ("advbench", "hhh", "mt_bench", "xstest") if figure.startswith(name))
    places = subset_places(len(getattr(suite, benchmark)), suite.limit)
    if benchmark != "xstest":
        return places
    safe = figure.startswith("xstest_safe")
    return [place for place in places if suite.xstest[place].safe == safe]
