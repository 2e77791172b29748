"""A whole run of configs/paper at 8B and small counts: random weights, ``launch/run.py``, and what each stage took."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from fedsim.base.journal import Journal, read_log
from fedsim.config import Config, load_config
from fedsim.model.load import EMBEDDED
from fedsim.parallel.world import process_world
from fedsim.record.metrics import Row, read_rows
from fedsim.run.checks import preflight
from fedsim.run.needs import memory_needs, round_work
from launch.run import main as launch
from tools.bench import models
from tools.bench.models import ModelSize
from tools.gpu.launch import ROOT, stand_ins
from tools.gpu.memory import MIB, WORKSPACES
from tools.gpu.report import Report, Setting
from tools.gpu.steps import GIB, THIN

CONFIG: Final = ROOT / "configs" / "paper" / "fedavg-filter-cai.yaml"
REPLY: Final = 40  # tokens of a reply in the mean
EVALUATIONS: Final = 5  # before all, and before and after CAI in each of two rounds
# A guard of random weights may call every row unsafe: all rows count in full, whatever it says.
EMBEDDED_DATA: Final = [
    "data.square=embedded", "eval.advbench=embedded", "eval.hhh=embedded", "eval.mt_bench=embedded",
    "eval.xstest=embedded", "cai.constitution=tiny", "guard.action=downweight", "guard.red_weight=1",
    "wandb.mode=off", "eval.every=1", "federation.num_rounds=2",
]  # fmt: skip
COUNTS: Final = {
    False: ["data.federated_rows=400", "data.guard_rows=160", "data.cai_rows=64", "guard.tune_epochs=2",
            "local.steps=5", "cai.iterations=5", "cai.max_new_tokens=128", "eval.limit=24", "eval.max_new_tokens=128"],
    True: ["data.federated_rows=80", "data.guard_rows=32", "data.cai_rows=8", "guard.tune_epochs=1", "local.steps=2",
           "local.batch_size=4", "local.micro_batch_size=2", "cai.iterations=1", "cai.batch_size=4",
           "cai.max_new_tokens=64", "eval.limit=6", "eval.max_new_tokens=8", "federation.num_clients=10"],
}  # fmt: skip
"""What differs from configs/paper, by whether it is a dry run."""

STAGES: Final[dict[str, tuple[str, ...]]] = {
    "guard fine-tuning": ("making guard-adapter",),
    "guard scoring": ("making guard-verdicts",),
    "local training": ("local training",),
    "CAI (DPO)": ("constitutional AI",),
    "generation": ("making cai-conversations", "evaluate"),
}
"""Stages of :func:`fedsim.run.needs.memory_needs`, and the beginnings of the log's names for them."""


def run(setting: Setting, report: Report) -> None:
    """Make the model, run, and say what each stage took."""
    began = time.monotonic()
    model = setting.folder / "model"
    make_model(THIN if setting.dry else models.GPU, setting, model)
    report.figure("model of random weights made and written, s", round(time.monotonic() - began, 1))
    arguments = overrides(setting, model)
    watch = Watch(setting.device)
    note = "; ".join(stand_ins())
    sys.argv = ["launch/run.py", str(CONFIG), *arguments]
    print(" ".join(sys.argv), flush=True)
    began = time.monotonic()
    with watch.watching():
        status = launch()
    report.figure("run, s", round(time.monotonic() - began, 1))
    report.add("exit status of the run", status, 0.0, note)
    folder = setting.kept("run")
    config = load_config(CONFIG, arguments)
    rows = read_rows(folder / config.name / "metrics.jsonl")
    evaluations = sum(row["stage"] == "eval" for row in rows)
    report.add("evaluations that are missing", EVALUATIONS - evaluations, 0.0)
    report.figure("choices", [text for text in notes(folder / config.name) if "attention of" in text or "layers" in text
                              or "graphs" in text])  # fmt: skip
    report.figure("rounds", [figures_of(row) for row in rows if row["stage"] == "round"])
    report.figure("speed", speed(config, rows, watch))
    compare_memory(setting, report, config, watch)


def overrides(setting: Setting, model: Path) -> list[str]:
    """The command line of the run."""
    places = [
        "name=whole", f"record.dir={setting.kept('run')}", f"record.artefacts={setting.folder / 'artefacts'}",
        f"model.path={model}", f"guard.path={model}", f"parallel.device={'cuda' if setting.cuda else 'cpu'}",
    ]  # fmt: skip
    dtype = [] if setting.cuda else ["model.dtype=float32"]
    return [*places, *EMBEDDED_DATA, *COUNTS[setting.dry], *dtype]


@torch.no_grad()
def make_model(size: ModelSize, setting: Setting, folder: Path) -> None:
    """Write a model directory: weights drawn on the device, and the embedded model's tokenizer.

    Replies are to be text that ends. So one channel of the hidden state is about the same everywhere, as all tokens'
    embeddings have it, and the head makes of it a logit for the end token that lets replies have some :data:`REPLY`
    tokens, and low ones for special tokens and those that the tokenizer lacks. Ordinary tokens' logits have σ = 1.
    """
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    model: Any = models.build(size, dtype, setting.device)
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    end_word = json.loads((EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == end_word)
    known = min(token["id"] for token in tokenizer["added_tokens"])  # special tokens follow the ordinary ones
    generator = torch.Generator(setting.device).manual_seed(1)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    width = table.shape[1]
    table.normal_(generator=generator)
    table[:, 0] = width**0.5  # as much as all other channels together
    some = torch.randint(known, (8, 32), generator=generator, device=setting.device)
    level = model.model(some).last_hidden_state[..., 0].float().mean()  # of the channel, behind the last norm
    head.zero_()
    head[:known].normal_(0, width**-0.5, generator=generator)
    head[:, 0] = -20 / level
    head[:known, 0] = 0
    head[end, 0] = (math.log(known / REPLY) + 0.5) / level  # 0.5: log of the mean of exp of a normal number
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder, max_shard_size="4GB")
    for path in EMBEDDED.iterdir():
        if path.name.startswith(("token", "special", "chat_template")):
            shutil.copy(path, folder)
    del model, table, head
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()


@dataclass
class Stage:
    """What a stage of the run took, without the stages inside it."""

    times: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class _Open:
    """A stage that is under way."""

    began: float
    inner_s: float = 0.0
    peak_bytes: int = 0


class Watch:
    """Seconds and the largest GPU memory of every stage that the run's log names.

    Attributes:
        stages: by their name in the log.
    """

    def __init__(self, device: torch.device) -> None:
        self.stages: dict[str, Stage] = {}
        self._on_gpu = device.type == "cuda"
        self._open: list[_Open] = []
        self._since_reset = 0  # the largest since the run itself last reset its count
        self._largest: Callable[..., int] = torch.cuda.max_memory_allocated
        self._reset: Callable[..., None] = torch.cuda.reset_peak_memory_stats

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The block's stages are watched; what the run itself reads of peaks stays as it would be."""
        plain, watch = Journal.at, self

        @contextmanager
        def at(journal: Journal, **place: int | str) -> Iterator[None]:
            stage = place.get("stage")
            with plain(journal, **place):
                if not isinstance(stage, str):
                    yield
                    return
                with watch._stage(stage):
                    yield

        def largest(device: Any = None) -> int:
            return max(watch._since_reset, watch._largest(device))

        def reset(device: Any = None) -> None:
            watch._note()
            watch._since_reset = 0

        Journal.at = at  # type: ignore[method-assign, assignment]
        torch.cuda.max_memory_allocated = largest
        torch.cuda.reset_peak_memory_stats = reset
        try:
            yield
        finally:
            Journal.at = plain  # type: ignore[method-assign]
            torch.cuda.max_memory_allocated = self._largest
            torch.cuda.reset_peak_memory_stats = self._reset

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._note()
        own = _Open(time.monotonic())
        self._open.append(own)
        try:
            yield
        finally:
            self._note()
            self._open.pop()
            whole = time.monotonic() - own.began
            if self._open:
                self._open[-1].inner_s += whole
            found = self.stages.setdefault(name, Stage())
            found.times += 1
            found.seconds += whole - own.inner_s
            found.peak_bytes = max(found.peak_bytes, own.peak_bytes)

    def _note(self) -> None:
        """Book the memory since the last note to the innermost stage."""
        if not self._on_gpu:
            return
        largest = self._largest()
        self._since_reset = max(self._since_reset, largest)
        if self._open:
            self._open[-1].peak_bytes = max(self._open[-1].peak_bytes, largest)
        self._reset()


def notes(folder: Path) -> list[str]:
    """Texts that the run's log notes."""
    return [str(line["text"]) for line in read_log(folder / "logs" / "rank-000.jsonl") if line.get("event") == "note"]


def figures_of(row: Row) -> dict[str, Any]:
    """A round's figures of time and work."""
    return {name: value for name, value in row.items() if name.startswith(("time/", "perf/", "parallel/", "cai/"))}


def speed(config: Config, rows: Sequence[Row], watch: Watch) -> dict[str, float | None]:
    """What the run comes to, in the units of the benchmark."""
    rounds = [row for row in rows if row["stage"] == "round"]
    last: Mapping[str, Any] = rounds[-1] if rounds else {}
    clients, num_steps = round_work(config)

    def of_stages(beginning: str) -> float:
        return sum(stage.seconds for name, stage in watch.stages.items() if name.startswith(beginning))

    judged = watch.stages.get("making guard-verdicts", Stage())
    tuned = config.guard.tune_epochs * config.data.guard_rows / config.guard.tune_batch_size
    found: dict[str, float | None] = {
        "local step, s (second round)": _over(last.get("time/train_s"), clients * num_steps),
        "CAI iteration, s (second round)": _over(last.get("time/cai_s"), config.cai.iterations),
        "guard fine-tuning, s a step": _over(of_stages("making guard-adapter"), tuned),
        "guard scoring, rows a minute, loading included": _over(
            60.0 * config.data.federated_rows * judged.times, judged.seconds
        ),
        "CAI conversations, rows a minute": _over(60.0 * config.data.cai_rows, of_stages("making cai-conversations")),
        "evaluation, s": _over(of_stages("evaluate"), EVALUATIONS),
    }
    for prefix in ("", "cai_", "evaluate_"):
        for name in ("tokens_per_s", "mfu"):
            found[f"{prefix}{name} (second round)"] = last.get(f"perf/{prefix}{name}")
    return found


def _over(value: float | None, parts: float) -> float | None:
    return None if value is None or not parts else value / parts


def compare_memory(setting: Setting, report: Report, config: Config, watch: Watch) -> None:
    """Each stage's peak beside the bound that ``--check`` shows."""
    gc.collect()
    parallel = config.parallel
    with process_world(exact=parallel.exact, threads=1, timeout_s=60, device=parallel.device) as world:
        found = preflight(config, world)
    needs = {need.stage: need.num_bytes for need in memory_needs(config, found.shapes, 1)}
    table = {
        name: {"times": s.times, "s": round(s.seconds, 2), "peak_gib": round(s.peak_bytes / GIB, 3)}
        for name, s in watch.stages.items()
    }
    report.figure("stages", table)
    for stage, names in STAGES.items():
        peaks = [s.peak_bytes for name, s in watch.stages.items() if name.startswith(names)]
        report.add(f"{stage}: not in the run's log", float(not peaks), 0.0)
        if setting.cuda and peaks:
            words = f"peak {max(peaks) / GIB:.2f} GiB, bound {needs[stage] / GIB:.2f} GiB"
            report.add(
                f"{stage}: peak beyond --check's bound, MiB", (max(peaks) - needs[stage]) / MIB, WORKSPACES / MIB, words
            )
    bounds = {stage: round(needs[stage] / GIB, 3) for stage in needs}
    report.figure("bounds of --check, GiB", bounds)
