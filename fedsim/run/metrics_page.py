"""Reference of all metrics: docs/metrics.md (``python tools/metrics_page.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedsim.base.figures import Benchmarks, Figure
from fedsim.base.metric import Metric, declared
from fedsim.evaluate.own import DESCRIBED
from fedsim.evaluate.suite import length_metrics
from fedsim.record.metrics import RESUME
from fedsim.record.timers import PhaseTimers
from fedsim.run import stage_metrics
from fedsim.run.local_rows import LocalRows
from fedsim.run.throughput import Meter
from fedsim.safety.alignment import step_metrics
from fedsim.safety.cai_data import count_metrics
from fedsim.safety.cai_usage import CaiUsage

INTRODUCTION: Final = """# Metrics

Every name that a run's `metrics.jsonl` can hold. A row is one JSON object with `round` (1 is the first; 0 is the
pretrained model) and `stage`; the other names depend on the stage, and each section below is one. Weights & Biases gets
the same names. Written by `python tools/metrics_page.py` from the declarations in the code.

- `<name>_low` and `<name>_high` are the ends of a 95 % interval, in the figure's unit: Wilson's for a share of things
  that are so or not, Student's for a mean, cut to the figure's scale. There is none where all values are alike.
- `<name>_count` is how many items a figure is taken over, where the table names no other count.
- `{client}` and other names in braces stand for what varies; a client has three digits (`client/loss_003`).
- Units: `%` is a share in percent, 0 to 100; "share, 0 to 1" is one that is not; without a unit it is a number of
  things, or a text.
- `time/`, `perf/` and `parallel/` measure the machine. All others are equal, bit for bit, for any number of processes
  in exact mode.
- A metric without a condition is in every row of its stage."""

EVALUATION: Final = """One row for each point: `pretrained`, `before_cai`, `after_cai`, or `global` where the round has
no CAI. The figures of a benchmark are there where the benchmark is (`eval.<name>` is not empty) and has items for them.
A figure also has variants, whose names begin with its name and `_`, such as
`eval/mt_bench_category_writing` or `eval/advbench_harmless_gcg`. Figures of a benchmark of your own are those that it
declares ([Extend it](extend.md#a-benchmark))."""


@dataclass(frozen=True)
class Stage:
    """Rows of one stage.

    Attributes:
        about: occasion on which such a row is written, for the page.
        writers: functions whose metrics it holds, in their order.
    """

    about: str
    writers: Sequence[Callable[..., Any]]

    @property
    def metrics(self) -> list[Metric]:
        """Metrics that its rows can hold, each once."""
        found: dict[Metric, None] = {}
        for writer in self.writers:
            for metric in declared(writer):
                found[metric] = None
        return list(found)


STAGES: Final = {
    "guard": Stage(
        "The guard model asked in another way than the run's "
        "(`guard.measure_untuned`,\n`guard.measure_policies`); `point` says how.",
        (stage_metrics.of_point, stage_metrics.of_verdicts),
    ),
    "filter": Stage(
        "Once a run: the filter, and the rows that are left.",
        (
            stage_metrics.of_guard,
            stage_metrics.of_point,
            LocalRows.metrics,
            stage_metrics.of_tuning,
        ),
    ),
    "cai_data": Stage(
        "Once a run with CAI: its conversations.",
        (
            count_metrics,
            stage_metrics.of_cai_texts,
            stage_metrics.of_cai_findings,
            CaiUsage.metrics,
        ),
    ),
    "prepare": Stage(
        "Once a run: time and work of everything before the first round. A resumed session "
        f"writes a row\n`{RESUME}` with the same names.",
        (PhaseTimers.pop, Meter.pop),
    ),
    "round": Stage(
        "Each round.",
        (
            stage_metrics.of_delivered,
            stage_metrics.of_attendance,
            stage_metrics.of_rate,
            stage_metrics.of_failures,
            stage_metrics.of_training,
            stage_metrics.of_attackers,
            step_metrics,
            stage_metrics.of_state,
            PhaseTimers.pop,
            Meter.pop,
        ),
    ),
    "eval": Stage(EVALUATION, (stage_metrics.of_point, stage_metrics.of_origin, length_metrics)),
}
"""Stages of ``metrics.jsonl`` in the order of a run; the last also has the benchmarks' figures."""


def documented(stage: str, name: str, benchmarks: Benchmarks = DESCRIBED) -> bool:
    """Return whether the page has a name of a stage's row."""
    # Names that the stage declares.
    known = STAGES[_known(stage)].metrics
    if name in ("round", "stage") or any(metric.covers(name) for metric in known):
        return True

    # The benchmarks' figures and counts.
    if stage != "eval" or not name.startswith("eval/"):
        return False
    is_count = any(name == figure.count_metric for figure in benchmarks.figures)
    return is_count or benchmarks.of(name.removeprefix("eval/")) is not None


def page() -> str:
    """The reference as a Markdown page: a section a stage, and a table a benchmark."""
    parts = [INTRODUCTION]
    for name, stage in STAGES.items():
        parts += [f"## {name}", stage.about, _table(stage.metrics)]
    for benchmark in DESCRIBED:
        parts += [f"### {benchmark.title} (`eval.{benchmark.name}`)", _figures(benchmark.figures)]
    return "\n\n".join(parts) + "\n"


def _known(stage: str) -> str:
    if stage == RESUME:
        return "prepare"
    return stage


def _table(metrics: Sequence[Metric]) -> str:
    lines = ["| metric | meaning | unit | also | if |", "| --- | --- | --- | --- | --- |"]
    for metric in metrics:
        also = ", ".join(f"`{end}`" for end in metric.ends if end)
        cells = (f"`{metric.name}`", metric.meaning, metric.unit, also, _with_keys(metric.when))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_keys(condition: str) -> str:
    """A condition, as code where it is one on a configuration key."""
    is_code = "=" in condition.partition(" ")[0] or " > " in condition
    return f"`{condition}`" if is_code else condition


def _figures(figures: Sequence[Figure]) -> str:
    lines = ["| metric | meaning | unit | scale | count |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        scale = ""
        if figure.scale is not None:
            scale = f"{figure.scale[0]:g} to {figure.scale[1]:g}"
        count = ""
        if figure.count:
            count = f"`{figure.count_metric}`"
        elif figure.unit:
            count = "`_count`"
        meaning = figure.title.replace("|", "\\|")
        if figure.headline:
            meaning += ", **headline**"
        lines.append(f"| `{figure.metric}` | {meaning} | {figure.unit} | {scale} | {count} |")
    return "\n".join(lines)
