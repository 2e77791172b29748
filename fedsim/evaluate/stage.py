"""The benchmarks that a run's configuration asks for, and the texts that they leave behind."""

from __future__ import annotations

import time
from pathlib import Path

from fedsim.artefacts import ArtefactStore, write_json
from fedsim.config import EvalConfig
from fedsim.data import world
from fedsim.data.benchmarks import load_advbench, load_hhh, load_mt_bench
from fedsim.data.prepare import embedded_file
from fedsim.evaluate.fastchat import write_answers
from fedsim.evaluate.suite import Evaluation, Suite


def load_suite(settings: EvalConfig, store: ArtefactStore) -> tuple[Suite, dict[str, Path]]:
    """Read every benchmark, and say which files they came from (by benchmark name).

    The embedded world's judge and rubric come with its own benchmarks only.

    Raises:
        DataError: a missing or malformed file.
    """
    files: dict[str, Path] = {}
    if settings.advbench:
        files["advbench"] = _file(settings.advbench, store, "advbench")
    if settings.hhh:
        files["hhh"] = _file(settings.hhh, store, "hhh")
    if settings.mt_bench:
        files["mt_bench"] = _file(settings.mt_bench, store, "mt_bench")
    suite = Suite(
        advbench=load_advbench(files["advbench"]) if "advbench" in files else (),
        hhh=load_hhh(files["hhh"]) if "hhh" in files else (),
        mt_bench=load_mt_bench(files["mt_bench"]) if "mt_bench" in files else (),
        judge=world.judge_reply if settings.advbench == "embedded" else None,
        rubric=world.rubric_score if settings.mt_bench == "embedded" else None,
        advbench_phrases=settings.advbench_phrases,
        hhh_scorer=settings.hhh_scorer,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.limit,
    )
    return suite, files


def _file(value: str, store: ArtefactStore, kind: str) -> Path:
    if value != "embedded":
        return Path(value).expanduser()
    if kind == "mt_bench":
        return embedded_file(store, "world-mt-bench", "question.jsonl", lambda path: world.write_mt_bench(path.parent))
    write = {"advbench": world.write_advbench, "hhh": world.write_hhh}[kind]
    return embedded_file(store, f"world-{kind}", f"{kind}.{'csv' if kind == 'advbench' else 'jsonl'}", write)


def write_texts(found: Evaluation, folder: Path, model_id: str, *, attacks: bool) -> None:
    """Write what the model said, on rank 0: MT-Bench answers (harmless questions) as FastChat's files.

    Args:
        folder: made where there is something to write.
        model_id: names the model and the point in FastChat's files.
        attacks: also write the replies to attack prompts (``record.texts``); they go nowhere else.
    """
    if found.answers:
        write_answers(folder / "mt_bench", found.answers, model_id, tstamp=time.time())
    if attacks and found.advbench is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replies = [{"item": i, "reply": reply.text} for i, reply in enumerate(found.advbench.replies)]
        write_json(folder / f"advbench-{model_id}.json", replies)
