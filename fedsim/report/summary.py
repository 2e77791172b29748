"""Summary of a run in words and tables: ``summary.md`` and the final table on the terminal.

Everything is read from the metric rows. A figure that no row holds is "not measured"; a section
without any is left out.
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
"""Cell of an MT-Bench score whose answers no judge has rated."""

TEMPLATES_NOTE = (
    "Intervals take prompts as independent; these fill a few templates: "
    "clustered ones would be wider."
)  # fmt: skip
"""A caution about the embedded world's intervals."""


@dataclass(frozen=True)
class RunFacts:
    """Facts that the summary states about a run beside its metric rows.

    Attributes:
        name: the run's name.
        algorithm: ``federation.algorithm``.
        guard: kind of the filter, ``none`` without.
        method: filter and CAI in words (:func:`paper.method_of`).
        embedded_model: the model is the tiny one that ships with fedsim.
        real_files: configuration keys whose data are files rather than the embedded world.
        fictional: titles of the benchmarks whose items are the embedded world's.
        unknown_files: titles of the benchmarks whose file is not the published one, by SHA-256.
        mt_bench: source of the MT-Bench questions: ``embedded``, a file, or empty if left out.
        judge: name of the judge of MT-Bench; empty if there is none.
        advbench_rule: rule behind the headline figure, a phrase set or ``strict_world``.
        hhh_scorer: scorer behind the headline figure.
        num_rounds: rounds that were configured.
        num_ranks: processes.
        seed: the run's seed.
        total_s: seconds of all its phases.
        places: title of what was written → its place.
        plots: file names of pictures beside ``summary.md``.
        notes: further lines, such as rows that a split left over.
        guard_tables: the guard's tables (:func:`guard_section.read_tables`).
        maker: the fedsim that writes the summary (:func:`fedsim.base.version.maker`).
        benchmarks: that the run can have measured.
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
        """Aggregation and method, such as ``FedAvg, FL + filter + CAI``."""
        return paper.arm_name(self.algorithm, self.method)

    @property
    def unrated(self) -> bool:
        """True if MT-Bench is answered, and nothing rates the answers."""
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
    """Collect the facts that a configuration decides, and those that are given.

    Args:
        config: the resolved configuration, dotted key → value.
        manifest: the run's; without one, no benchmark file is compared with the published one.
        benchmarks: that the run can have measured.
    """
    # Data that are the embedded world's, or real files.
    real_files, fictional = [], []
    if config["data.square"] and not is_embedded("data.square", config["data.square"]):
        real_files.append("data.square")
    for benchmark in benchmarks:
        key = f"eval.{benchmark.name}"
        if key not in config:  # a user's own
            continue
        if is_embedded(key, config[key]):
            fictional.append(benchmark.title)
        elif config[key]:
            real_files.append(key)
    judge = ""
    if config["judge.kind"] != "none":
        judge = title("judge.kind", config["judge.kind"], config)
    return RunFacts(
        name=config["name"],
        algorithm=config["federation.algorithm"],
        guard=config["guard.kind"],
        method=paper.method_of(config),
        embedded_model=config["model.path"] == "embedded",
        real_files=tuple(real_files),
        fictional=tuple(fictional),
        mt_bench=config["eval.mt_bench"],
        judge=judge,
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


def unknown_files(
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    benchmarks: Benchmarks,
) -> tuple[str, ...]:
    """Titles of the paper's benchmarks whose file is not the published one that fedsim knows.

    Files are compared by their SHA-256 in the manifest.
    """
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
    """Write the whole of ``summary.md``."""
    points = eval_points(rows)
    # What the run is, and what its figures must not be taken for.
    parts = [f"# Run {facts.name}", *(f"> {line}" for line in caveats(facts)), _headline(facts)]
    # Headline figures.
    parts.append("## Safety and helpfulness")
    parts += [arm_table(rows, facts, short=False).markdown(), _caption(rows, facts)]
    lines = [*cai_lines(rows), *figure_lines(rows, facts.benchmarks)]
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines))
    parts += [f"![{plot.removesuffix('.png')} by round]({plot})" for plot in facts.plots]
    # Sections; each is empty without figures for it.
    parts += sections.evaluations(points, facts.benchmarks)
    parts += guard_section.guard(rows, facts.guard, facts.guard_tables)
    parts += sections.clients(rows)
    parts += dropped_rows.section(rows)
    parts += client_failures.section(rows)
    parts += sections.cai(rows)
    parts += sections.times(rows)
    # Notes, places and maker.
    if facts.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in facts.notes)]
    if facts.places:
        places = "\n".join(f"- {what}: `{place}`" for what, place in facts.places.items())
        parts += ["## Where everything is", places]
    if facts.maker:
        parts.append(f"Written by {facts.maker}; manifest.json names all versions.")
    return "\n\n".join(parts) + "\n"


def terminal_table(rows: Sequence[Row], facts: RunFacts) -> str:
    """Write the lines that end a run: its arm beside the pretrained model's and the paper's rows.

    Below them are the lines of single figures, the caveats, and the places of the run's files.
    """
    lines = [_headline(facts), "", arm_table(rows, facts, short=True).plain()]
    lines += ["", "[low, high] = 95 % interval"]
    lines += [*cai_lines(rows), *figure_lines(rows, facts.benchmarks), *caveats(facts)]
    if facts.places:
        width = max(len(what) for what in facts.places)  # characters
        lines += ["", "Written:"]
        lines += [f"  {what:<{width}}  {place}" for what, place in facts.places.items()]
    return "\n".join(lines)


def arm_table(rows: Sequence[Row], facts: RunFacts, short: bool) -> Table:
    """The pretrained model and the arm, each with the paper's figures under it.

    In between is the model before CAI's last share of training, if there is one.

    Args:
        short: for a terminal, with short headings.
    """
    points, headlines = eval_points(rows), facts.benchmarks.headlines
    # The pretrained model has the same row in both halves of the paper's table.
    lines = [
        _measured_line("pretrained", points.get("pretrained"), facts),
        _paper_line(paper.TABLE_1["fedavg"][paper.PRETRAINED], headlines),
    ]
    if "before_cai" in points:
        label = f"{_round_of(points['before_cai'])}, before CAI"
        lines.append(_measured_line(label, points["before_cai"], facts))
    # The model that the run ended with.
    lines.append(_measured_line(facts.arm, points.get("after_cai", points.get("global")), facts))
    published = paper.paper_row(facts.algorithm, facts.method)
    if published is not None:
        lines.append(_paper_line(published, headlines))
    return Table(["", *(_heading(figure, points.values(), short) for figure in headlines)], lines)


def eval_points(rows: Sequence[Row]) -> dict[str, Row]:
    """Select the evaluations to compare, by evaluation point.

    They are ``pretrained``, the last ``before_cai``, and the last ``after_cai`` or ``global``.
    A run with CAI ends with it, so that what it measured in rounds without CAI is left out.
    """
    last: dict[str, Row] = {}
    for row in rows:
        if row["stage"] == "eval":
            last[str(row.get("point"))] = row
    if "after_cai" in last:
        last.pop("global", None)
    return {point: last[point] for point in sections.POINT_TITLES if point in last}


def caveats(facts: RunFacts) -> list[str]:
    """Sentences on what the figures must not be taken for."""
    lines = []
    # The model.
    if facts.embedded_model and facts.real_files:
        files = ", ".join(facts.real_files)
        lines.append(
            f"The tiny model that ships with fedsim cannot understand real files ({files}): the "
            "run shows that every row is processed, and its figures mean nothing."
        )
    elif facts.embedded_model:
        tiny = "The model is the tiny one that ships with fedsim"
        lines.append(f"{tiny}: the run shows that it works, not the paper's numbers.")
    # The benchmarks' items.
    if facts.fictional:
        *others, named = facts.fictional
        if others:
            named = f"{', '.join(others)} and {named}"
        items = "the embedded world's own items in the published formats"
        lines.append(f"{named}: {items}, not the published ones.")
        lines.append(TEMPLATES_NOTE)
    if facts.unknown_files:
        lines.append(
            f"{' and '.join(facts.unknown_files)}: not the published file (its SHA-256 differs), "
            "so that the figures do not compare with the paper's."
        )
    # The judge of MT-Bench.
    if facts.mt_bench == "embedded":
        scored = "scored by a rubric"
        if facts.judge:
            scored = f"judged by {facts.judge}"
        lines.append(f"MT-Bench is {scored}; the paper's by GPT-4.")
    elif facts.unrated:
        lines.append(
            "MT-Bench answers were written and not rated, as judge.kind=none: fedsim judge RUN_DIR "
            "judge.kind=... judge.model=... rates them."
        )
    elif facts.mt_bench and facts.judge != "gpt-4":
        judges = f"MT-Bench is judged by {facts.judge}, the paper's by GPT-4"
        lines.append(f"{judges}: the two scores do not compare.")
    return lines


def _measured_line(label: str, row: Row | None, facts: RunFacts) -> list[str]:
    cells = [label]
    for figure in facts.benchmarks.headlines:
        if facts.unrated and figure.name == "mt_bench" and row is not None:
            cells.append(NOT_RATED)
        else:
            cells.append(with_interval(row, figure.metric, figure.digits))
    return cells


def _paper_line(row: paper.SafetyRow, headlines: Sequence[Figure]) -> list[str]:
    return ["– in the paper", *(row.shown(figure.name) for figure in headlines)]


def _headline(facts: RunFacts) -> str:
    """State arm, rounds, seed, processes and time of the run on one line."""
    rounds = f"{facts.num_rounds} round{'s' if facts.num_rounds != 1 else ''}"
    processes = f"{facts.num_ranks} process{'es' if facts.num_ranks != 1 else ''}"
    return f"{facts.arm} · {rounds} · seed {facts.seed} · {processes} · {duration(facts.total_s)}"


def _caption(rows: Sequence[Row], facts: RunFacts) -> str:
    """State the round, rules and counts behind the arm's table."""
    evaluated = list(eval_points(rows).values())
    lines = ["No evaluation has run."]
    always_a = None
    if evaluated:
        lines = [f"The arm's row is from {_round_of(evaluated[-1])}."]
        always_a = measured(evaluated[-1], "eval/hhh_always_a")
    paper_counts = f"{paper.NUM_ADVBENCH}, {paper.NUM_HHH} and {paper.NUM_MT_BENCH} items"
    lines.append(
        f"[low, high] = 95 % interval. AdvBench by the rule {facts.advbench_rule}, HHH by the "
        f"scorer {facts.hhh_scorer}. The paper's figures ({paper.SOURCE}, Table 1) are of "
        f"Llama-3.1-8B-Instruct on {paper_counts}, without intervals."
    )
    if always_a is not None:
        lines.append(f"Always answering (A) scores {always_a:.2f} % on HHH.")
    return " ".join(lines)


def figure_lines(rows: Sequence[Row], benchmarks: Benchmarks) -> list[str]:
    """Lines of single figures: controls, replies cut at the limit, and turns left unrated.

    The phrase rules of AdvBench reward a model that refuses everything; the controls show it.
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
    """Lines of the shares that have one, and their notes.

    Such as ``…, innocent prompts refused: pretrained 2.0 % [0.9, 4.6], ... of 250.``
    """
    points = eval_points(rows)
    lines, notes = [], []
    for figure in benchmarks.lines("always"):
        if not figure.is_share:
            continue
        shown = []
        for point, row in points.items():
            if measured(row, figure.metric) is not None:
                value = with_interval(row, figure.metric, figure.digits, " %")
                shown.append(f"{sections.POINT_TITLES[point]} {value}")
        if not shown:
            continue
        count = sections.counts_of(points.values(), figure)
        lines.append(f"{figure.title.replace(': ', ', ', 1)}: {', '.join(shown)} of {count}.")
        if figure.note:
            notes.append(figure.note)
    return lines + notes  # all notes below all lines


def _number_lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    """A line of a number of things; none where it was not counted.

    Such as ``AdvBench replies truncated: pretrained 2 of 520, ...``. The last evaluation of each
    point is named. Of a line that is always there, the sum over all evaluations ends it where
    there are others.
    """
    points = eval_points(rows)
    # The last evaluation of each point.
    counts = []
    for point, row in points.items():
        value, total = measured(row, figure.metric), measured(row, figure.count_metric)
        if value is not None and total is not None and (value or figure.line == "always"):
            counts.append(f"{sections.POINT_TITLES[point]} {value:,.0f} of {total:,.0f}")
    if not counts:
        return []
    # All evaluations together.
    evaluations = [row for row in rows if row["stage"] == "eval"]
    if figure.line == "always" and len(evaluations) > len(points):
        values, totals = 0.0, 0.0
        for row in evaluations:
            value, total = measured(row, figure.metric), measured(row, figure.count_metric)
            if value is not None and total is not None:
                values, totals = values + value, totals + total
        counts.append(f"in all {values:,.0f} of {totals:,.0f}")
    return [f"{figure.title}: {', '.join(counts)}."]


def thoughts(rows: Sequence[Row]) -> list[str]:
    """A line on replies with thoughts, where the model thinks.

    Such as ``Replies with thoughts, ...: pretrained 12 of 1,130, 2 of them without an answer``.
    """
    counts = []
    for point, row in eval_points(rows).items():
        count = measured(row, "eval/thoughts")
        if count:
            counts.append(
                f"{sections.POINT_TITLES[point]} {count:,.0f} of {row['eval/num_replies']:,.0f}, "
                f"{row['eval/thoughts_unfinished']:,.0f} of them without an answer"
            )
    if not counts:
        return []
    return [f"Replies with thoughts, which are not part of an answer: {'; '.join(counts)}."]


def _round_of(row: Row) -> str:
    return f"round {row['round']}"


def _heading(figure: Figure, points: Iterable[Row], short: bool) -> str:
    """``HHH: right choices, % (n = 438)``, or for a terminal ``HHH % n=438``."""
    count = sections.counts_of(points, figure)
    if short:
        words = f"{figure.short} {figure.unit_words}".strip()
        return f"{words} n={count}" if count else words
    return heading(figure, count)


def heading(figure: Figure, count: str) -> str:
    """Format a column's heading, such as ``HHH: right choices, % (n = 438)``.

    Args:
        count: number of items; "" if it is not known.
    """
    if not count:
        return figure.label
    return f"{figure.label} (n = {count})"
