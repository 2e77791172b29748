"""Cost of exact mode: ``tools/exact_cost.py [--nproc 1,4] [--repeats 3] [CONFIG.yaml] [key=value …]``.

Runs the configuration (the demo by default, four rounds without a guard, 50 items of each benchmark) with
``parallel.exact`` on and off, once with each number of processes, and takes the seconds of each phase from
``metrics.jsonl``. The settings take turns, each repeat begins with another one, and what runs share (CAI conversations,
the pretrained model's evaluation) is made before by one run of each setting that does not count; nor does the first
round of any run. Shown are medians over rounds and repeats, with the quartiles, and the ratio of exact to fast: median
of the repeats' own ratios, with the smallest and the largest.

``--large`` replaces the demo's model of 0.4 M parameters by a Llama of 5.8 M with random weights and
the paper's LoRA (r 32 on q and v). Arithmetic then outweighs the overhead of Python in a step. A model
with random weights does not end its replies, so these runs only train and aggregate.

The rows go to ``tools/bench/results/<device>/operations/``; ``--page`` runs nothing and writes
``docs/results/exact-cost.md`` from them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

from fedsim.base.errors import ConfigError, RunError  # noqa: E402
from fedsim.base.launching import Parser, launched  # noqa: E402
from fedsim.base.tables import Table, duration, number  # noqa: E402
from fedsim.record.metrics import read_rows  # noqa: E402
from fedsim.study.bench_rows import Row, StageResult  # noqa: E402
from fedsim.world.tiny_model import TINY_DIR  # noqa: E402
from tools import running  # noqa: E402
from tools.bench.models import CPU, ModelSize, build  # noqa: E402

NAME, LARGE_NAME = "exact_cost", "exact_cost_large"
PAGE = running.PAGES / "exact-cost.md"
BRIEF = ["name=cost", "federation.num_rounds=4", "guard.kind=none", "eval.every=2", "eval.limit=50", "wandb.mode=off"]
PHASES = ("train", "aggregate", "cai", "evaluate", "round")
TITLES = {
    "train": "local training",
    "aggregate": "aggregation, waiting included",
    "cai": "CAI",
    "evaluate": "evaluation",
    "round": "whole round without evaluation",
}
# Of a model with random weights: neither CAI nor benchmarks.
LARGE = [
    "cai.iterations=0",
    "eval.every=0",
    *(f"eval.{benchmark}=" for benchmark in ("advbench", "hhh", "mt_bench", "xstest", "helpful")),
    "model.lora_r=32",
    "model.lora_alpha=64",
    "model.lora_targets=[q_proj,v_proj]",
]
Seconds = dict[str, list[float]]  # of each phase, by round


@dataclass(frozen=True)
class Setting:
    """One way to run."""

    num_ranks: int
    exact: bool


def phases(rows: Sequence[Mapping[str, Any]]) -> Seconds:
    """Seconds of each phase in every round of a run but the first; rounds without a phase have no entry in it."""
    found: Seconds = {name: [] for name in PHASES}
    for row in rows:
        if row["stage"] != "round" or row["round"] == 1:
            continue
        for name in PHASES[:-1]:
            if (spent := row.get(f"time/{name}_s")) is not None:
                found[name].append(float(spent))
        found["round"].append(float(row["perf/round_s"]) - float(row.get("time/evaluate_s", 0.0)))
    return found


def take_turns(settings: Sequence[Setting], repeats: int) -> list[Setting]:
    """All settings, ``repeats`` times, each time beginning with another one."""
    order = []
    for turn in range(repeats):
        start = turn % len(settings)
        order += [*settings[start:], *settings[:start]]
    return order


def run(setting: Setting, words: Sequence[str], folder: Path, limit_s: float) -> Seconds:
    """One run from start to end.

    Raises:
        RunError: it fails, or takes longer than ``limit_s``.
    """
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        places = [f"record.dir={runs}", f"record.artefacts={folder / 'artefacts'}"]
        exact = f"parallel.exact={'true' if setting.exact else 'false'}"
        what = f"the run of {setting.num_ranks} process(es) with {exact}"
        try:
            done = subprocess.run(
                running.command(setting.num_ranks, [*words, *places, exact]),
                env=running.environment(),
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{what} took longer than --limit-s {limit_s:g}; give it more, or fewer rounds") from error
        if done.returncode != 0:
            last = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise RunError(f"{what} ended with status {done.returncode}: {last}")
        (metrics,) = Path(runs).glob("*/metrics.jsonl")
        return phases(read_rows(metrics))


def write_large_model(folder: Path) -> None:
    """The benchmark's Llama of 5.8 M parameters, random weights from a fixed seed, with the demo model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIR, local_files_only=True, trust_remote_code=False)
    config = CPU.config | {"max_position_embeddings": tokenizer.model_max_length}
    model = build(ModelSize(CPU.name, config), torch.float32, torch.device("cpu"))
    for ids in (model.config, model.generation_config):
        assert ids is not None
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(ids, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(
    settings: Sequence[Setting], words: Sequence[str], repeats: int, limit_s: float, *, large: bool = False
) -> list[Row]:
    """All runs, as rows."""
    found: dict[Setting, list[Seconds]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        if large:
            write_large_model(Path(folder) / "model")
            words = [*words, f"model.path={folder}/model"]
        warm = [*words, "federation.num_rounds=1"]
        for number_of_run, setting in enumerate([*settings, *take_turns(settings, repeats)]):
            began, counts = time.perf_counter(), number_of_run >= len(settings)
            seconds = run(setting, words if counts else warm, Path(folder), limit_s)
            mode = "exact" if setting.exact else "fast"
            kind = f"a round {number(median(seconds['round']))} s" if counts else "does not count"
            print(
                f"{setting.num_ranks} process(es), {mode}: {duration(time.perf_counter() - began)}, {kind}", flush=True
            )
            if counts:
                found[setting].append(seconds)
    return [row for setting in settings if setting.exact for row in rows_of(setting.num_ranks, found)]


def rows_of(num_ranks: int, found: Mapping[Setting, Sequence[Seconds]]) -> list[Row]:
    """A row for every phase that was seen, with both modes and their ratio."""
    exact, fast = (found[Setting(num_ranks, mode)] for mode in (True, False))
    rows = []
    for phase in PHASES:
        both = [[value for each in runs for value in each[phase]] for runs in (exact, fast)]
        if not all(both):
            continue
        pairs = zip(exact, fast, strict=True)
        ratios = [median(mine[phase]) / median(other[phase]) for mine, other in pairs if mine[phase] and other[phase]]
        figures = {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        for mode, values in zip(("exact", "fast"), both, strict=True):
            low, middle, high = _quartiles(values)
            figures |= {f"{mode}_s": middle, f"{mode}_low_s": low, f"{mode}_high_s": high}
        shapes = {"ranks": num_ranks, "rounds": len(both[0]), "repeats": len(exact)}
        note = "seconds of a round: median and quartiles over rounds and repeats; ratio: exact to fast, of runs in turn"
        rows.append(Row(NAME, phase, "float32", shapes, figures=figures, note=note))
    return rows


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: Sequence[Row]) -> Table:
    """A line for each phase and number of processes."""
    lines = []
    for row in rows:
        figures = row.figures
        modes = [
            f"{number(figures[f'{mode}_s'])} [{number(figures[f'{mode}_low_s'])}, {number(figures[f'{mode}_high_s'])}]"
            for mode in ("exact", "fast")
        ]
        ratio = f"{figures['ratio']:.2f} [{figures['ratio_low']:.2f}, {figures['ratio_high']:.2f}]"
        lines.append([str(row.shapes["ranks"]), TITLES[row.name], *modes, ratio])
    return Table(["processes", "phase", "exact, s", "fast, s", "exact ÷ fast"], lines, num_text=2)


def page() -> str:
    """The result page, from the rows' files."""
    parts = [
        "# Cost of exact mode",
        "The same run with `parallel.exact` on and off. Written by `python tools/exact_cost.py --page`.",
        *section("The demo", NAME, BRIEF[1:]),
    ]
    if list(running.RESULTS.glob(f"*/{running.FOLDER}/{LARGE_NAME}.json")):
        parts += section("A Llama of 5.8 M parameters, training and aggregation", LARGE_NAME, [*BRIEF[1:], *LARGE])
    return "\n\n".join(parts) + "\n"


def section(title: str, name: str, settings: Sequence[str]) -> list[str]:
    """Heading, table and origin of the newest rows of one size."""
    found = running.newest_rows(name)
    repeats = found.rows[0].shapes["repeats"]
    made = " ".join(["python tools/exact_cost.py", *found.facts["words"]])
    return [
        f"## {title}",
        table(found.rows).markdown(),
        f"Seconds of a round, median [quartiles] over {repeats} run(s) each that took turns; ratio: median [smallest, "
        f"largest] of the turns. The demo with {', '.join(settings)}, unless overridden. "
        f"{running.measured_on(found)} Made by `{made}`.",
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="tools/exact_cost.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="another configuration, overrides")
    parser.add_argument("--nproc", default="1,4", help="numbers of processes (1,4)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting (3)")
    parser.add_argument(
        "--large", action="store_true", help="a model of 5.8 M parameters; training and aggregation alone"
    )
    parser.add_argument("--limit-s", type=float, default=300.0, help="longest time of one run (300)")
    parser.add_argument("--out", type=Path, help="file for the rows")
    parser.add_argument("--page", action="store_true", help=f"run nothing, write {PAGE.name} from the committed rows")
    asked = parser.parse_intermixed_args(arguments)
    if asked.repeats < 1:
        raise ConfigError(f"--repeats {asked.repeats}: must be >= 1; the spread needs several")
    asked.counts = running.process_counts(asked.nproc)
    asked.given = asked.words
    asked.words = running.run_words(asked.words, [*BRIEF, *LARGE] if asked.large else BRIEF)
    return asked


def work(asked: argparse.Namespace) -> None:
    """Run, print and write."""
    if asked.page:
        running.write_page(PAGE, page())
        return
    facts = running.facts() | {"words": [*(["--large"] if asked.large else []), *asked.given]}
    settings = [Setting(count, exact) for count in asked.counts for exact in (True, False)]
    rows = measure(settings, asked.words, asked.repeats, asked.limit_s, large=asked.large)
    print(table(rows).plain())
    running.write_rows(StageResult(LARGE_NAME if asked.large else NAME, facts, [], rows), asked.out)


def main() -> int:
    """Measure; a mistake is one line."""
    return launched(lambda: parse(sys.argv[1:]), work)


if __name__ == "__main__":
    sys.exit(main())
