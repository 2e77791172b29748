"""The benchmarks that a run's configuration asks for."""

from __future__ import annotations

from pathlib import Path

from fedsim.artefacts import ArtefactStore
from fedsim.config import EvalConfig
from fedsim.data import world
from fedsim.data.benchmarks import load_advbench, load_hhh, load_mt_bench
from fedsim.data.prepare import embedded_file
from fedsim.evaluate.suite import Suite


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
