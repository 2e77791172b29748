"""Summary of a run in words and tables: ``summary.md`` and the final table on the terminal.

Everything is read from the metric rows. A figure that no row holds is "not measured"; a section without any is left
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.base.figures import Benchmarks, Figure
from fedsim.base.tables import Table, duration, measured, with_interval
from fedsim.config.measuring import is_embedded, is_unrated
from fedsim.extend import title
from fedsim.record.metrics import Row
from fedsim.report import client_failures, dropped_rows, guard_section, paper, sections
from fedsim.report.cai_line import cai_lines

NOT_RATED = "not rated"
"""Stands for a score of MT-Bench whose answers no judge has read."""


TEMPLATES_NOTE = "Intervals take prompts as independent; these fill a few templates: clustered ones would be wider."
"""A caution about the embedded world's intervals."""


@dataclass(frozen=True)
class RunFacts:
    """What the summary says about a run beside its metric rows.

    Attributes:
        name: the run's name.
        algorithm: ``federation.algorithm``.
        guard: kind of the filter, ``none`` without.
        method: filter and CAI in words (:func:`paper.method_of`).
        embedded_model: the model is the tiny one that ships with fedsim.
        real_files: configuration keys whose data are files rather than the embedded world.
        fictional: titles of the benchmarks whose items are the embedded world's.
        unknown_files: titles of the benchmarks whose file is not the published one, by its SHA-256.
        mt_bench: source of the MT-Bench questions: ``embedded``, a file, or empty if left out.
        judge: name of the judge of MT-Bench; empty if there is none.
        advbench_rule: rule behind the headline figure, a phrase set or ``strict_world``.
        hhh_scorer: scorer behind the headline figure.
        num_rounds: rounds that were configured.
        num_ranks: processes.
        seed: the run's seed.
        total_s: seconds from the start to the summary.
        places: what was written → where.
        plots: file names of pictures beside ``summary.md``.
        notes: further lines, such as rows that a split left over.
        guard_tables: the guard's tables beside the metric rows (see :func:`guard_section.read_tables`).
        maker: the fedsim that writes the summary (:func:`fedsim.base.version.maker`).
        benchmarks: what the run can have measured.
    """

    name: str
    algorithm: str
    guard: str
    method: str
    embedded_model: bool
    real_files: tuple[str, ...]
    fictional: tuple[str, ...]
    mt_bench: str
    judge: str
    advbench_rule: str
    hhh_scorer: str
    num_rounds: int
    num_ranks: int
    seed: int
    total_s: float
    places: Mapping[str, str] = field(default_factory=dict)
    plots: Sequence[str] = ()
    notes: Sequence[str] = ()
    guard_tables: guard_section.Tables = field(default_factory=dict)
    maker: str = ""
    unknown_files: tuple[str, ...] = ()
    benchmarks: Benchmarks = field(default_factory=Benchmarks)

    @property
    def arm(self) -> str:
        """Such as ``FedAvg, FL + filter + CAI``."""
        return paper.arm_name(self.algorithm, self.method)

    @property
    def unrated(self) -> bool:
        """MT-Bench is answered, and nothing rates the answers."""
        return is_unrated(self.mt_bench, judged=bool(self.judge))


def facts_from(
    config: Mapping[str, Any],
    *,
    num_ranks: int,
    total_s: float,
    places: Mapping[str, str],
    plots: Sequence[str] = (),
    notes: Sequence[str] = (),
    guard_tables: guard_section.Tables | None = None,
    maker: str = "",
    manifest: Mapping[str, Any] | None = None,
    benchmarks: Benchmarks,
) -> RunFacts:
    """The facts that a resolved configuration (dotted keys → values) decides, and those only the run knows.

    Args:
        manifest: the run's; without one, no benchmark file is compared with the published one.
        benchmarks: what the run can have measured.
    """
    by_key = {f"eval.{benchmark.name}": benchmark for benchmark in benchmarks}
    by_key = {key: benchmark for key, benchmark in by_key.items() if key in config}
    return RunFacts(
        name=config["name"],
        algorithm=config["federation.algorithm"],
        guard=config["guard.kind"],
        method=paper.method_of(config),
        embedded_model=config["model.path"] == "embedded",
        real_files=tuple(key for key in ("data.square", *by_key) if config[key] and not is_embedded(key, config[key])),
        fictional=tuple(benchmark.title for key, benchmark in by_key.items() if is_embedded(key, config[key])),
        mt_bench=config["eval.mt_bench"],
        judge="" if config["judge.kind"] == "none" else title("judge.kind", config["judge.kind"], config),
        advbench_rule=config["eval.advbench_phrases"],
        hhh_scorer=config["eval.hhh_scorer"],
        num_rounds=config["federation.num_rounds"],
        num_ranks=num_ranks,
        seed=config["seed"],
        total_s=total_s,
        places=places,
        plots=plots,
        notes=notes,
        guard_tables=guard_tables or {},
        maker=maker,
        unknown_files=unknown_files(config, manifest or {}, benchmarks),
        benchmarks=benchmarks,
    )


def unknown_files(config: Mapping[str, Any], manifest: Mapping[str, Any], benchmarks: Benchmarks) -> tuple[str, ...]:
    """Titles of the paper's benchmarks whose file differs from the published one that fedsim was tested on."""
    inputs = manifest.get("inputs", {})
    found = []
    for benchmark in benchmarks:
        key, entry = f"eval.{benchmark.name}", inputs.get(benchmark.name)
        in_paper = any(figure.name in paper.NUM_ITEMS for figure in benchmark.figures)
        if not in_paper or entry is None or is_embedded(key, config[key]):
            continue
        if entry["sha256"] != benchmark.published:
            found.append(benchmark.title)
    return tuple(found)


def summary_markdown(rows: Sequence[Row], facts: RunFacts) -> str:
    """The whole of ``summary.md``."""
    parts = [f"# Run {facts.name}", *(f"> {line}" for line in caveats(facts)), _headline(facts)]
    parts += ["## Safety and helpfulness", arm_table(rows, facts, short=False).markdown(), _caption(rows, facts)]
    lines = [*cai_lines(rows), *figure_lines(rows, facts.benchmarks)]
    parts += ["\n".join(f"- {line}" for line in lines)] if lines else []
    parts += [f"![{plot.removesuffix('.png')} by round]({plot})" for plot in facts.plots]
    parts += sections.evaluations(eval_points(rows), facts.benchmarks)
    parts += guard_section.guard(rows, facts.guard, facts.guard_tables)
    parts += sections.clients(rows)
    parts += dropped_rows.section(rows)
    parts += client_failures.section(rows)
    parts += sections.cai(rows)
    parts += sections.times(rows)
    if facts.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in facts.notes)]
    if facts.places:
        parts += ["## Where everything is", "\n".join(f"- {what}: `{where}`" for what, where in facts.places.items())]
    parts += [f"Written by {facts.maker}; manifest.json names all versions."] if facts.maker else []
    return "\n\n".join(parts) + "\n"


def terminal_table(rows: Sequence[Row], facts: RunFacts) -> str:
    """The lines that end a run: its arm beside the pretrained model's and the paper's rows, and where things are."""
    width = max((len(what) for what in facts.places), default=0)
    places = [f"  {what:<{width}}  {where}" for what, where in facts.places.items()]
    lines = [_headline(facts), "", arm_table(rows, facts, short=True).plain(), "", "[low, high] = 95 % interval"]
    found = [*cai_lines(rows), *figure_lines(rows, facts.benchmarks)]
    lines += [*found, *caveats(facts)]
    return "\n".join([*lines, *(["", "Written:", *places] if places else [])])


def arm_table(rows: Sequence[Row], facts: RunFacts, short: bool) -> Table:
    """The pretrained model and the arm, each with the paper's figures under it, and what CAI started from."""
    points, headlines = eval_points(rows), facts.benchmarks.headlines
    lines = [
        _measured_line("pretrained", points.get("pretrained"), facts),
        _paper_line(paper.TABLE_1["fedavg"][paper.PRETRAINED], headlines),
    ]
    if "before_cai" in points:
        label = f"{_round_of(points['before_cai'])}, before CAI"
        lines.append(_measured_line(label, points["before_cai"], facts))
    lines.append(_measured_line(facts.arm, points.get("after_cai", points.get("global")), facts))
    published = paper.paper_row(facts.algorithm, facts.method)
    if published is not None:
        lines.append(_paper_line(published, headlines))
    return Table(["", *(_heading(figure, points.values(), short) for figure in headlines)], lines)


def eval_points(rows: Sequence[Row]) -> dict[str, Row]:
    """The evaluations to compare: ``pretrained``, the last ``before_cai``, the last ``after_cai`` or ``global``.

    A run with CAI ends with it, so that what it measured in rounds without CAI is not among them.
    """
    last: dict[str, Row] = {}
    for row in rows:
        if row["stage"] == "eval":
            last[str(row.get("point"))] = row
    if "after_cai" in last:
        last.pop("global", None)
    return {point: last[point] for point in ("pretrained", "before_cai", "after_cai", "global") if point in last}


def caveats(facts: RunFacts) -> list[str]:
    """What the figures must not be taken for."""
    lines = []
    if facts.embedded_model and facts.real_files:
        lines.append(
            f"The tiny model that ships with fedsim cannot understand real files ({', '.join(facts.real_files)}): the "
            "run shows that every row is processed, and its figures mean nothing."
        )
    elif facts.embedded_model:
        lines.append(
            "The model is the tiny one that ships with fedsim: the run shows that it works, not the paper's numbers."
        )
    if facts.fictional:
        *others, last = facts.fictional
        named = f"{', '.join(others)} and {last}" if others else last
        lines.append(f"{named}: the embedded world's own items in the published formats, not the published ones.")
        lines.append(TEMPLATES_NOTE)
    if facts.unknown_files:
        lines.append(
            f"{' and '.join(facts.unknown_files)}: not the published file (its SHA-256 differs), so that the "
            "figures do not compare with the paper's."
        )
    if facts.mt_bench == "embedded":
        scored = f"judged by {facts.judge}" if facts.judge else "scored by a rubric"
        lines.append(f"MT-Bench is {scored}; the paper's by GPT-4.")
    elif facts.unrated:
        lines.append(
            "MT-Bench answers were written and not rated, as judge.kind=none: fedsim judge RUN_DIR "
            "judge.kind=... judge.model=... rates them."
        )
    elif facts.mt_bench and facts.judge != "gpt-4":
        lines.append(f"MT-Bench is judged by {facts.judge}, the paper's by GPT-4: the two scores do not compare.")
    return lines


def _measured_line(label: str, row: Row | None, facts: RunFacts) -> list[str]:
    cells = [label]
    for figure in facts.benchmarks.headlines:
        is_unrated = facts.unrated and figure.name == "mt_bench" and row is not None
        cells.append(NOT_RATED if is_unrated else with_interval(row, figure.metric, figure.digits))
    return cells


def _paper_line(row: paper.SafetyRow, headlines: Sequence[Figure]) -> list[str]:
    return ["– in the paper", *(row.shown(figure.name) for figure in headlines)]


def _headline(facts: RunFacts) -> str:
    rounds = "1 round" if facts.num_rounds == 1 else f"{facts.num_rounds} rounds"
    processes = "1 process" if facts.num_ranks == 1 else f"{facts.num_ranks} processes"
    return f"{facts.arm} · {rounds} · seed {facts.seed} · {processes} · {duration(facts.total_s)}"


def _caption(rows: Sequence[Row], facts: RunFacts) -> str:
    points = eval_points(rows)
    last = list(points.values())[-1:]
    paper_counts = f"{paper.NUM_ADVBENCH}, {paper.NUM_HHH} and {paper.NUM_MT_BENCH} items"
    lines = [
        f"The arm's row is from {_round_of(last[0])}." if last else "No evaluation has run.",
        f"[low, high] = 95 % interval. AdvBench by the rule {facts.advbench_rule}, HHH by the scorer "
        f"{facts.hhh_scorer}. The paper's figures ({paper.SOURCE}, Table 1) are of Llama-3.1-8B-Instruct on "
        f"{paper_counts}, without intervals.",
    ]
    always_a = measured(last[0], "eval/hhh_always_a") if last else None
    if always_a is not None:
        lines.append(f"Always answering (A) scores {always_a:.2f} % on HHH.")
    return " ".join(lines)


def figure_lines(rows: Sequence[Row], benchmarks: Benchmarks) -> list[str]:
    """Lines of the figures that have their own: controls, replies cut at the limit, and what a judge did not rate.

    The phrase rules of AdvBench reward a model that refuses everything; the controls stand beside it.
    """
    lines = controls(rows, benchmarks)
    for figure in benchmarks.lines("always"):
        if not figure.is_share:
            lines += _number_lines(rows, figure)
    lines += thoughts(rows)
    for figure in benchmarks.lines("unless 0"):
        lines += _number_lines(rows, figure)
    return lines


def controls(rows: Sequence[Row], benchmarks: Benchmarks) -> list[str]:
    """``…, innocent prompts refused: pretrained 2.0 % [0.9, 4.6], ... of 250.`` and the like, and their notes."""
    lines, notes = [], []
    points = eval_points(rows)
    for figure in benchmarks.lines("always"):
        if not figure.is_share:
            continue
        shown = [
            f"{sections.POINT_TITLES[point]} {with_interval(row, figure.metric, figure.digits, ' %')}"
            for point, row in points.items()
            if measured(row, figure.metric) is not None
        ]
        if not shown:
            continue
        counts = {measured(row, figure.count_metric) for row in points.values()}
        total = "/".join(f"{count:,.0f}" for count in sorted(c for c in counts if c is not None))
        lines.append(f"{figure.title.replace(': ', ', ', 1)}: {', '.join(shown)} of {total}.")
        notes += [figure.note] if figure.note else []
    return lines + notes


def _number_lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    """``AdvBench replies truncated: pretrained 2 of 520, ...``, or nothing where it was not counted.

    The last evaluation of each point is named. Of a line that is always there, all evaluations are added up at its end
    where there were others.
    """
    points = eval_points(rows)
    evaluations = [row for row in rows if row["stage"] == "eval"]
    counts = []
    for point, row in points.items():
        value, total = measured(row, figure.metric), measured(row, figure.count_metric)
        if value is not None and total is not None and (value or figure.line == "always"):
            counts.append(f"{sections.POINT_TITLES[point]} {value:,.0f} of {total:,.0f}")
    if counts and figure.line == "always" and len(evaluations) > len(points):
        values, totals = 0.0, 0.0
        for row in evaluations:
            value, total = measured(row, figure.metric), measured(row, figure.count_metric)
            if value is not None and total is not None:
                values, totals = values + value, totals + total
        counts.append(f"in all {values:,.0f} of {totals:,.0f}")
    return [f"{figure.title}: {', '.join(counts)}."] if counts else []


def thoughts(rows: Sequence[Row]) -> list[str]:
    """``Replies with thoughts, ...: pretrained 12 of 1,130, 2 of them never ended``, where the model thinks."""
    counts = [
        f"{sections.POINT_TITLES[point]} {count:,.0f} of {row['eval/num_replies']:,.0f}, "
        f"{row['eval/thoughts_unfinished']:,.0f} of them without an answer"
        for point, row in eval_points(rows).items()
        if (count := measured(row, "eval/thoughts"))
    ]
    return [f"Replies with thoughts, which are not part of an answer: {'; '.join(counts)}."] if counts else []


def _round_of(row: Row) -> str:
    return f"round {row['round']}"


def _heading(figure: Figure, points: Iterable[Row], short: bool) -> str:
    """``HHH: right choices, % (n = 438)``, or for a terminal ``HHH % n=438``."""
    counts = sorted({int(count) for row in points if (count := measured(row, figure.count_metric)) is not None})
    shown = "/".join(f"{count:,}" for count in counts)
    if short:
        heading = f"{figure.short} {figure.unit_words}".strip()
        return f"{heading} n={shown}" if shown else heading
    return f"{figure.label} (n = {shown})" if shown else figure.label
